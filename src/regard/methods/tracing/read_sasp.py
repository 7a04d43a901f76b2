"""READ's similarity as points: where an answer token looks like the image tokens, as points that gradients pass.

    s_i = h_i · h_a                        last hidden states of image token i and of the answer token (there: <SEG>)
    m = (s - min s) / (max s - min s)      a map over the grid, in [0, 1]

    +  m ≥ 0.8, the highest first          points on what is meant, for a decoder of masks
    -  m ≤ 0.2, the lowest first           points on what is not
    ·  all others, in raster order         the list is + - ·, and of it the first 30: with 30 of + there is no -

    p' = Σ_q w_q q / Σ_q w_q,   w_q = exp(-‖q - p‖²) softmax(m)_q     over all pixels q of the enlarged map

The classes are found on the map made smaller, p is a cell's centre in whole pixels. p' moves by about a pixel, towards
higher m, and carries the gradient of m; the choice of cells carries none.

One row of three tokens, a pixel each. The middle point has w = e^(m - d²) with m = 0, 1, 1/2 and d = 1, 0, 1:

>>> import torch
>>> image, answer = torch.tensor([[[1.0], [3.0], [2.0]]]), torch.tensor([[2.0]])
>>> found = measure(image, answer, (1, 3), (1, 3), Config(smooth=1))
>>> found.map.tolist(), found.labels.tolist()
([[[0.0, 1.0, 0.5]]], [[1, 0, -1]])
>>> first = found.points[0, 0, 0].item()  # (e + 2 / √e) / (1 / e + e + 1 / √e)
>>> round(first, 4), round((2.71828 + 2 / 1.64872) / (1 / 2.71828 + 2.71828 + 1 / 1.64872), 4)
(1.0646, 1.0646)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.tracing import TracingPage

Pair = tuple[int, int]


@dataclass(frozen=True)
class Config:
    positive: float = 0.8  # least m of a positive point, on the smaller map
    negative: float = 0.2  # largest m of a negative point, on the smaller map
    points: int = 30  # P, of each image; fewer where the smaller map has fewer cells
    smooth: int = 2  # cells of the map that one cell of the smaller map stands for, each way

    def __post_init__(self) -> None:
        rule = "0 <= negative < positive <= 1"
        require(0 <= self.negative < self.positive <= 1, rule, negative=self.negative, positive=self.positive)
        require(self.points >= 1, "points >= 1", points=self.points)
        require(self.smooth >= 1, "smooth >= 1", smooth=self.smooth)


@dataclass(frozen=True)
class Points:
    """The map, and the points it gives."""

    map: Tensor  # [B, gy, gx] in [0, 1]
    points: Tensor  # [B, P, 2] x and y in pixels, from 0 at the centre of the first one
    labels: Tensor  # [B, P] 1 positive, 0 negative, -1 neither


def min_max(x: Tensor) -> Tensor:
    """x [B, h, w] brought to [0, 1], map by map; a map of one value is 0."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / torch.where(high > low, high - low, 1)


def similarity(image: Tensor, answer: Tensor, grid: Pair) -> Tensor:
    """[B, gy, gx] from states of image tokens [B, gy·gx, C], in raster order, and of the answer token [B, C]."""
    return (image @ answer[..., None])[..., 0].unflatten(1, grid)


def resized(x: Tensor, size: Pair) -> Tensor:
    """[B, *size] of x [B, h, w], bilinear."""
    return F.interpolate(x[:, None], size, mode="bilinear")[:, 0]


def chosen(small: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """(cells [B, P] in the order of the list, labels [B, P]) of a map [B, h, w]."""
    m = small.flatten(1)
    key = torch.where(m >= cfg.positive, -m, torch.where(m <= cfg.negative, 2 + m, 4))
    key, cells = key.sort(dim=1, stable=True)
    labels = torch.where(key < 0, 1, torch.where(key < 4, 0, -1))
    return cells[:, : cfg.points], labels[:, : cfg.points]


def soft(whole: Tensor, points: Tensor) -> Tensor:
    """[B, P, 2] continuous places of whole pixels [B, P, 2] on the enlarged map [B, H, W]."""
    weight = whole.flatten(1).softmax(1).view_as(whole)
    ys, xs = (torch.arange(n, device=whole.device, dtype=whole.dtype) for n in whole.shape[1:])
    near_x, near_y = (
        (-(axis - points[..., i, None]).square()).exp() for i, axis in enumerate((xs, ys))
    )  # [B, P, W], [B, P, H]
    total = torch.einsum("bph,bhw,bpw->bp", near_y, weight, near_x)
    x = torch.einsum("bph,bhw,bpw->bp", near_y, weight, near_x * xs)
    y = torch.einsum("bph,bhw,bpw->bp", near_y * ys, weight, near_x)
    return torch.stack([x / total, y / total], -1)


def measure(image: Tensor, answer: Tensor, grid: Pair, size: Pair, cfg: Config = Config()) -> Points:
    """Of states image [B, gy·gx, C] and answer [B, C]: the map, and its points in an image of `size` (H, W) pixels."""
    rule = "a state for each cell of the grid, of the answer's width"
    require(
        image.shape[1:] == (grid[0] * grid[1], answer.shape[-1]), rule, image=image, answer=answer, grid=grid
    )
    require(
        min(grid) >= cfg.smooth, "a grid of `smooth` cells or more each way", grid=grid, smooth=cfg.smooth
    )
    s = similarity(image, answer, grid)
    m, small = min_max(s), min_max(resized(s, (grid[0] // cfg.smooth, grid[1] // cfg.smooth)))
    cells, labels = chosen(small.detach(), cfg)
    high, wide = small.shape[1:]
    x = ((cells % wide + 0.5) * size[1] / wide).clamp(max=size[1] - 1).floor()
    y = ((cells // wide + 0.5) * size[0] / high).clamp(max=size[0] - 1).floor()
    return Points(m, soft(resized(m, size), torch.stack([x, y], -1).to(m)), labels)


def enlarged(m: list[list[float]], size: Pair) -> list[list[float]]:
    """Bilinear, pixel centres on pixel centres, the outermost values held."""

    def places(n: int, into: int) -> list[tuple[int, int, float]]:
        at = [max(0.0, (i + 0.5) * n / into - 0.5) for i in range(into)]
        return [(min(int(a), n - 1), min(int(a) + 1, n - 1), a - int(a)) for a in at]

    return [
        [
            (1 - b) * ((1 - a) * m[y0][x0] + a * m[y0][x1]) + b * ((1 - a) * m[y1][x0] + a * m[y1][x1])
            for x0, x1, a in places(len(m[0]), size[1])
        ]
        for y0, y1, b in places(len(m), size[0])
    ]


def between_0_and_1(m: list[list[float]]) -> list[list[float]]:
    low, high = min(map(min, m)), max(map(max, m))
    return [[(x - low) / (high - low) if high > low else 0.0 for x in row] for row in m]


def reference(image: Tensor, answer: Tensor, grid: Pair, size: Pair, cfg: Config = Config()) -> Points:
    """The same by the definition: token by token, three lists, pixel by pixel."""
    maps, points, labels = [], [], []
    for states, asked in zip(image.double(), answer.double(), strict=True):
        s = [sum(float(a * b) for a, b in zip(state, asked, strict=True)) for state in states]
        rows = [s[y * grid[1] : (y + 1) * grid[1]] for y in range(grid[0])]
        m = between_0_and_1(rows)
        small = between_0_and_1(enlarged(rows, (grid[0] // cfg.smooth, grid[1] // cfg.smooth)))
        cells = [(v, x, y) for y, row in enumerate(small) for x, v in enumerate(row)]
        plus = sorted((c for c in cells if c[0] >= cfg.positive), key=lambda c: -c[0])
        minus = sorted((c for c in cells if c[0] <= cfg.negative), key=lambda c: c[0])
        rest = [c for c in cells if c not in plus and c not in minus]
        listed = [*((c, 1) for c in plus), *((c, 0) for c in minus), *((c, -1) for c in rest)][: cfg.points]
        big, moved = enlarged(m, size), []
        total = sum(exp(v) for row in big for v in row)
        for (_, cx, cy), _ in listed:
            px = int(min((cx + 0.5) * size[1] / len(small[0]), size[1] - 1))
            py = int(min((cy + 0.5) * size[0] / len(small), size[0] - 1))
            w = {
                (x, y): exp(-((x - px) ** 2) - (y - py) ** 2) * exp(v) / total
                for y, row in enumerate(big)
                for x, v in enumerate(row)
            }
            moved.append([sum(q[i] * v for q, v in w.items()) / sum(w.values()) for i in (0, 1)])
        maps.append(m)
        points.append(moved)
        labels.append([label for _, label in listed])
    as_tensor = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    return Points(as_tensor(maps), as_tensor(points), as_tensor(labels).long())


def cases(seed: int) -> Iterable[tuple]:
    """Odd grids and images larger and smaller than they, one cell, ties, a map of one value, lists cut and whole."""
    g = torch.Generator().manual_seed(seed)
    for batch, grid, size, cfg in (
        (1, (1, 1), (3, 2), Config(smooth=1)),
        (2, (4, 6), (9, 12), Config()),
        (1, (5, 3), (7, 7), Config(0.6, 0.3, 4)),
        (2, (3, 4), (3, 4), Config(0.9, 0.5, smooth=1)),
    ):
        image, answer = (
            torch.randn(batch, *shape, generator=g, dtype=torch.float64)
            for shape in ((grid[0] * grid[1], 3), (3,))
        )
        yield image, answer, grid, size, cfg
        yield (2 * image).round(), answer.round(), grid, size, cfg  # ties
    yield torch.ones(1, 4, 2, dtype=torch.float64), answer[:1, :2], (2, 2), (4, 4), Config(smooth=1)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="READ: similarity as points",
        paper="Reasoning to Attend: Try to Understand How <SEG> Token Works",
        year=2024,
        idea="the answer token's similarity to image tokens in the last layer, as positive and negative point prompts",
        cost="M·C for the map, P·H·W for the points",
        needs=("vlm", "hidden states"),
        lineage=("LISA", "CLIP Surgery"),
        caveat="a dot product, as in the released code (a cosine is another map); its softmax over one text weighs 1. "
        "There a square grid is padded to the image's aspect ratio (cells of the padding are no points) and points "
        "of equal value may come in any order; here grid and image cover the same, and ties keep raster order. The "
        "same code takes 60 points and 0.6, 0.2 for one test set. Points are no finer than the width of the kernel, "
        "a pixel, whatever the image's size. The decoder of masks is not here",
    ),
)
