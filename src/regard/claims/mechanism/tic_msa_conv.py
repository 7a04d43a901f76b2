"""MSA-Conv's claim: without shifts it is local at any resolution, and its cost grows with the number of pixels.

The operator gets an image and a crop of it, at several sizes, windows and dilations; away from the crop's borders the
two must agree, and at its borders, where the crop sees zeros instead of the image, they must not. Times are those of
the operator itself on one core, an image of 64 x 64 beside one of 32 x 32, and so for attention of all pixels to all.
Beside them stands what one would write without a page: all windows gathered by unfold.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import difference, generator, keep_freed_memory, median_times, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import tic_msa_conv as page

HEADS, WIDTH, SMALL, LARGE = 2, 32, 32, 64
SIZES = ((24, 24), (17, 40), (64, 48))
CASES = ((3, 1), (3, 3), (5, 2), (7, 1))  # (window, dilation)


def attended(qkv: tuple[Tensor, ...], sides: tuple[int, int], cfg: page.Config) -> Tensor:
    return page.METHOD.fast(*qkv, cfg, Call("self", grid=sides))[0]


def cropped(t: Tensor, sides: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    return t.unflatten(2, sides)[:, :, rows, columns].flatten(2, 3)


def crops() -> tuple[float, float]:
    """The largest difference inside a crop, and the least of those at its borders."""
    inner, border = [], []
    for sides in SIZES:
        qkv = random_qkv(generator(), HEADS, sides[0] * sides[1], WIDTH)
        for window, dilation in CASES:
            cfg, reach = page.Config(window, dilation), dilation * (window // 2)
            rows, columns = slice(1, sides[0] - 2), slice(2, sides[1] - 1)
            small = (sides[0] - 3, sides[1] - 3)
            wanted = cropped(attended(qkv, sides, cfg), sides, rows, columns)
            found = attended(tuple(cropped(t, sides, rows, columns) for t in qkv), small, cfg)
            off = (found - wanted).abs().amax((0, 1, 3)).view(small)
            inner.append(off[reach : small[0] - reach, reach : small[1] - reach].max().item())
            border.append(off[0].max().item())
    return max(inner), min(border)


def unfolded(q: Tensor, k: Tensor, v: Tensor, side: int, window: int) -> Tensor:
    """The same operator with every window gathered."""
    keys, values = (
        F.unfold(t.mT.reshape(HEADS, -1, side, side), window, padding=window // 2)
        .view(HEADS, t.shape[-1], window**2, -1)
        .permute(0, 3, 2, 1)
        for t in (k, v)
    )  # [H, N, w², D]
    s = torch.einsum("hnd,hnwd->hnw", q[0], keys) * WIDTH**-0.5
    return torch.einsum("hnw,hnwd->hnd", s.softmax(-1), values)[None]


def timed(rounds: int = 11) -> dict[tuple[str, int], float]:
    cfg, prepared = page.Config(), {}
    for side in (SMALL, LARGE):
        q, k, v = random_qkv(generator(), HEADS, side * side, WIDTH)
        sides: dict[str, Callable] = {
            "msa_conv": partial(attended, (q, k, v), (side, side), cfg),
            "global": partial(F.scaled_dot_product_attention, q, k, v),
            "unfold": partial(unfolded, q, k, v, side, cfg.window),
        }
        prepared |= {(name, side): asked for name, asked in sides.items()}
    keep_freed_memory()
    # on a busy machine a long run waits more often than a short one: time of other work is left out
    return median_times(prepared, rounds, clock=time.process_time)


def measure() -> Measured:
    inside, at_border = crops()
    q, k, v = random_qkv(generator(1), HEADS, SMALL * SMALL, WIDTH)
    gathered = difference(attended((q, k, v), (SMALL, SMALL), page.Config()), unfolded(q, k, v, SMALL, 3))
    with threads(1), torch.no_grad():
        times = timed()
    grown = {name: times[name, LARGE] / times[name, SMALL] for name in ("msa_conv", "global")}
    parts = {
        "inside a crop": inside < 1e-5,
        "not at its border": at_border > 1e-2,
        "padding stays in the softmax": gathered < 1e-5,
        "time": grown["msa_conv"] <= 5,
        "time of global attention": grown["global"] >= 10,
    }
    numbers = {"inside": inside, "at_border": at_border, "off_unfold": gathered}
    numbers |= {f"time_ratio_4x_pixels_{name}": ratio for name, ratio in grown.items()}
    numbers |= {f"ms_64x64_{name}": 1e3 * times[name, LARGE] for name in ("msa_conv", "global", "unfold")}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="tic_msa_conv",
    statement=(
        "without shifts the operator is local: inside, the output on a crop is the crop of the output, at any "
        "resolution, and its cost grows linearly with pixels"
    ),
    bound=(
        "difference inside a crop < 1e-5, at its border > 1e-2; equal to unfolded windows within 1e-5; time at 4x "
        "pixels <= 5x, that of global attention >= 10x"
    ),
    measure=measure,
)
