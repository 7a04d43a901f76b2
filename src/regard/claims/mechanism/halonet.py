"""HaloNet's claim: blocks with halos are masked dense attention, and follow an image moved by whole blocks only.

Masked dense attention is torch's own, the mask and the scores of steps written here for all pairs of pixels. Images
are moved down and right around their borders, and outputs are compared where no window meets a border, before or
after. The paper's b = 8 and h = 3 stand beside other sizes and sides that end in smaller blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import difference, generator, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import halonet as page

HEADS, WIDTH = 4, 32
CASES = (
    (8, 3, (32, 32)),
    (8, 3, (29, 19)),
    (4, 1, (12, 20)),
    (3, 2, (10, 7)),
    (5, 0, (15, 11)),
)  # b, h, image
MOVED = 64  # a side of the image that is moved

Sides = tuple[int, int]


def drawn(sides: Sides, cfg: page.Config) -> tuple[list[Tensor], dict[str, Tensor]]:
    g, steps = generator(cfg.block), 2 * (cfg.block + cfg.halo) - 1
    qkv = list(random_qkv(g, HEADS, sides[0] * sides[1], WIDTH))
    return qkv, {name: torch.randn(steps, WIDTH, generator=g) * WIDTH**-0.5 for name in ("rows", "columns")}


def mixed(qkv: list[Tensor], cfg: page.Config, sides: Sides, params: dict[str, Tensor]) -> Tensor:
    return page.METHOD.fast(*qkv, cfg, Call("self", grid=sides, params=params))[0]


def dense(
    qkv: list[Tensor], cfg: page.Config, sides: Sides, params: dict[str, Tensor], hides: bool = True
) -> Tensor:
    """All pairs of pixels, with the scores of their steps; those beyond the halo hidden, or none."""
    q, k, v = qkv
    place = torch.cartesian_prod(*(torch.arange(side) for side in sides))
    first = (place // cfg.block * cfg.block)[:, None]
    seen = ((place >= first - cfg.halo) & (place < first + cfg.block + cfg.halo)).all(-1)
    zero = cfg.block + cfg.halo - 1
    down, right = (place - place[:, None] + zero).clamp(0, 2 * zero).unbind(-1)
    steps = [
        (q @ params[name].mT).gather(-1, at.expand(1, HEADS, -1, -1))
        for name, at in (("rows", down), ("columns", right))
    ]
    bias = sum(steps) * WIDTH**-0.5
    return scaled_dot_product_attention(q, k, v, bias.masked_fill(~seen, -torch.inf) if hides else bias)


def off_dense(block: int, halo: int, sides: Sides) -> float:
    cfg = page.Config(block, halo)
    qkv, params = drawn(sides, cfg)
    return difference(mixed(qkv, cfg, sides, params), dense(qkv, cfg, sides, params))


def off_all(block: int, sides: Sides) -> float:
    """With h = max(sides) - b, from attention of all pixels to all, with the same steps."""
    cfg = page.Config(block, max(sides) - block)
    qkv, params = drawn(sides, cfg)
    return difference(mixed(qkv, cfg, sides, params), dense(qkv, cfg, sides, params, hides=False))


def off_moved(by: int) -> float:
    """Of an image that is moved by so many rows and columns, where no border is met."""
    cfg, sides = page.Config(), (MOVED, MOVED)
    qkv, params = drawn(sides, cfg)
    inside = slice(2 * cfg.block, MOVED - 3 * cfg.block)

    def out(moved: int) -> Tensor:
        rolled = [t.unflatten(2, sides).roll((moved, moved), (2, 3)).flatten(2, 3) for t in qkv]
        image = mixed(rolled, cfg, sides, params).unflatten(2, sides).roll((-moved, -moved), (2, 3))
        return image[:, :, inside, inside]

    return difference(out(by), out(0))


def measure() -> Measured:
    with threads(1), torch.no_grad():
        most = max(off_dense(*case) for case in CASES)
        whole = max(off_all(block, sides) for block, sides in ((8, (16, 24)), (4, (12, 12)), (8, (8, 8))))
        by_block = max(off_moved(by) for by in (8, 16))
        by_less = {by: off_moved(by) for by in (1, 3, 7)}
    numbers = {
        "difference_from_masked_dense": most,
        "difference_from_all_pairs": whole,
        "change_moved_by_blocks": by_block,
        "change_moved_by_1_3_7": list(by_less.values()),
    }
    parts = {
        "masked dense": most < 1e-5,
        "all pairs": whole < 1e-5,
        "moved by blocks": by_block < 1e-5,
        "moved by less": min(by_less.values()) > 1e-3,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="halonet",
    statement=(
        "blocked attention with halos is dense attention under the mask of blocks and halos with the same relative "
        "scores; it follows an image that is moved by whole blocks, and no other"
    ),
    bound=(
        "difference < 1e-5 from masked dense attention, and from attention of all to all where h = max(sides) - b; of "
        "an image moved by b and 2b the outputs away from borders change by < 1e-5, moved by 1, 3 or 7 by > 1e-3"
    ),
    measure=measure,
)
