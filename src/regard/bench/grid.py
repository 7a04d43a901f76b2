"""`regard bench grid`: attention on images, against SDPA on all of their places, side by side in one process.

Rows are those of the other benchmarks; `ratio` says what the case says: times faster than SDPA, or the exponent with
which time or memory grows with the number of pixels. Batch 1, 8 heads of width 32, float32, all cores that torch uses.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.bench.efficiency import bytes_held
from regard.bench.sparse import at_most
from regard.bench.timing import fitting, left, paired, row, seconds
from regard.core import Method, Unsupported
from regard.core.roles import Roles
from regard.explaining.places import is_on_grid
from regard.kinds.mechanism import run
from regard.ops.grid import Axis, boxes

LINEAR = ("fused_neighborhood_attention", "halonet", "davit")


@dataclass(frozen=True)
class Sizes:
    near: int = 64
    regions: int = 56
    sides: tuple[int, ...] = (56, 112)  # over which memory grows
    growing: tuple[int, ...] = (56, 112, 224)  # and time
    heads: int = 8
    width: int = 32
    window: int = 7
    repeats: int = 7


QUICK = Sizes(32, 28, (28, 56), (28, 56), 2, 32, 7, 1)


def rows(quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Everything that this benchmark measures. Say what is being measured through `progress`."""
    sizes, progress = QUICK if quick else Sizes(), progress or (lambda text: None)
    results: list[dict] = []
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        for part in (neighbourhood, routed, growth, memory):
            for one in part(sizes):
                results.append(one)
                progress(f"{one['case']}: {one['ratio']:.2f} (target {one['target']:g}) {one['note']}")
            gc.collect()
    return results


@dataclass(frozen=True)
class Asked:
    """A page and what it is asked: tokens of a square image, parameters as they begin, the input where it is read."""

    method: Method
    qkv: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]

    def out(self, *qkv: Tensor) -> Tensor:
        return run(self.method, *(qkv or self.qkv), pattern="self", **self.options)[0]

    def full(self, *qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(qkv or self.qkv))


def asked(name: str, side: int, sizes: Sizes, **settings: Any) -> Asked:
    method = catalog.method(name, **settings)
    page, heads, width = method.page, sizes.heads, sizes.width
    q, k, v = (torch.randn(1, heads, side * side, width) for _ in range(3))
    dims = {"heads": heads, "kv_heads": heads, "key": width, "value": width, "width": heads * width}
    options = {"roles": Roles.grid(side, side), "params": page.init(method.config, dims) if page.init else {}}
    if page.reads_x(method.config):
        options["x"] = torch.randn(1, side * side, heads * width)
    return Asked(method, (q, k, v), options)


def neighbourhood(sizes: Sizes) -> Iterator[dict]:
    """Forward, and forward and backward, against SDPA with the mask of the same neighbourhoods."""
    side, window = sizes.near, sizes.window
    ours = asked("fused_neighborhood_attention", side, sizes, window=window)
    mask = torch.zeros(side * side, side * side, dtype=torch.bool)
    for i, near in enumerate(boxes((side, side), [Axis(window)] * 2)):
        mask[i, near] = True
    case = f"neighbourhood of {window} x {window} on {side} x {side}, over SDPA with the mask"
    masked = lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask)  # noqa: E731
    times = paired(lambda: seconds(ours.out), lambda: seconds(lambda: masked(*ours.qkv)), sizes.repeats)
    yield row(f"{case}, forward", times, None, 5.0)
    live = [t.requires_grad_() for t in ours.qkv]
    gradient = torch.randn_like(live[2])

    def both(path: Callable[..., Tensor]) -> float:
        with torch.enable_grad():
            return seconds(lambda: torch.autograd.grad(path(*live), live, gradient))

    times = paired(lambda: both(ours.out), lambda: both(masked), max(1, sizes.repeats // 2))
    yield row(f"{case}, forward and backward", times, None, 3.0)


def routed(sizes: Sizes) -> Iterator[dict]:
    """Regions that the data chooses, the choice included, against SDPA on all places."""
    if "biformer_bra" in catalog.pages():
        ours = asked("biformer_bra", sizes.regions, sizes, regions=7, top_k=4)
        times = paired(lambda: seconds(ours.out), lambda: seconds(ours.full), sizes.repeats)
        side = sizes.regions
        yield row(f"biformer_bra, 4 of 49 regions on {side} x {side}, over SDPA", times, None, 3.0)


def growth(sizes: Sizes) -> Iterator[dict]:
    """With which power of the pixels time grows."""
    for name in (n for n in LINEAR if n in catalog.pages()):
        for settings in varieties(name):
            images = [asked(name, side, sizes, **settings) for side in sizes.growing]
            took = seconds(lambda images=images: [one.out() for one in images])
            # in turns, so that a busy moment is everybody's
            turns = [[seconds(one.out) for one in images] for _ in range(fitting(2 * sizes.repeats, took))]
            value = exponent([statistics.median(times) for times in zip(*turns)], sizes.growing)
            shown = catalog.method(name, **settings).label
            yield at_most(f"{shown}: power of the pixels in time, {span(sizes.growing)}", value, 1.1)


def varieties(name: str) -> list[dict[str, Any]]:
    """DaViT is two mechanisms, which take turns in its layers."""
    return [{"layer": 0, "layers": 2}, {"layer": 1, "layers": 2}] if name == "davit" else [{}]


def memory(sizes: Sizes) -> Iterator[dict]:
    """With which power of the pixels memory grows, for every page of images that reads a part of them."""
    for name in on_images():
        if left() <= 0:
            yield at_most(f"{name}: power of the pixels in memory, {span(sizes.sides)}", math.nan, 1.1)
            continue
        sides = [asked(name, side, sizes) for side in sizes.sides]
        value = exponent([float(bytes_held(one.out)) for one in sides], sizes.sides)
        yield at_most(f"{name}: power of the pixels in memory, {span(sizes.sides)}", value, 1.1)


def on_images() -> list[str]:
    """Pages of grids whose outputs depend on near places alone, or that are said to be linear here."""
    found = []
    for name, page in catalog.every():
        on = page.grid if is_on_grid(page) else None
        if on is not None:
            try:
                on.fits(page.config(), (56, 56))
            except (ValueError, Unsupported):
                continue
            if name in LINEAR or on.local(page.config()) is not None:
                found.append(name)
    return found


def span(sides: Sequence[int]) -> str:
    return " to ".join(f"{side} x {side}" for side in (sides[0], sides[-1]))


def exponent(values: Sequence[float], sides: Sequence[int]) -> float:
    """The power of the pixels with which values grow: least squares of their logarithms.

    >>> round(exponent([1.0, 4.0, 16.0], [10, 20, 40]), 6)
    1.0
    """
    pixels, logs = [2 * math.log(side) for side in sides], [math.log(value) for value in values]
    middle = statistics.mean(pixels)
    apart = [x - middle for x in pixels]
    return sum(x * y for x, y in zip(apart, logs)) / sum(x * x for x in apart)
