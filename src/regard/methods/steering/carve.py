"""CARVE: the picture cut down to what a question attends to and a general instruction does not.

    Ã_tl = A_tl / Σ_j A_tlj                        attention of answer token t in layer l to the image's tokens
    C_tl = Ã(question)_tl / (Ã(general)_tl + λ)
    M    = Σ_t t Σ_l C_tl                          t from 1, l over layers in `depth`; then resized to pixels

Of M's pixels the highest `share` stay, of the connected regions of these the heaviest (`regions`, or `region_share` of
them all if that is more). The rest of the picture is blanked, the box around what stays is cut out and enlarged to the
picture's size, and the question is asked of that. If attention is noise that any instruction meets times what this one
asks for, and a general one asks for everything alike, then C at λ = 0 is what this one asks for.

>>> noise, meaning = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 1.0, 2.0, 0.5])  # Σ noise · meaning = 1
>>> contrast(noise * meaning, noise, lam=0.0)
tensor([0.0000, 1.0000, 2.0000, 0.5000])
>>> regions(torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 1]]).bool()).unique(return_counts=True)[1].tolist()
[4, 2, 1, 2]
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.regions import flooded, regions, resized, stretched

EQUAL = 1 - 1e-5  # a pixel this close to the last one that stays, stays


@dataclass(frozen=True)
class Config:
    general: str | tuple[int, ...] = "Write a general description of the image."  # or its token ids
    lam: float = 1e-8  # λ, beside maps that sum to 1
    depth: tuple[float, float] = (0.7, 0.9)  # layer numbers over their count: 20 to 25 of 28
    share: float = 0.2  # of the pixels, which stay
    regions: int = 3  # how many stay at least, the heaviest
    region_share: float = 0.2  # of all regions, rounded down; so many stay where that is more than `regions`

    def __post_init__(self) -> None:
        first, last = self.depth
        require(len(self.general) > 0, "a general instruction", general=self.general)
        require(self.lam >= 0, "lam >= 0", lam=self.lam)
        require(0 <= first <= last <= 1, "0 <= first depth <= last <= 1", depth=self.depth)
        require(0 < self.share <= 1, "0 < share <= 1", share=self.share)
        require(self.regions >= 1, "a region or more", regions=self.regions)
        require(0 <= self.region_share <= 1, "0 <= region_share <= 1", region_share=self.region_share)


@dataclass(frozen=True)
class Focus:
    """fused [P] = M by token, kept [H, W] bool, box (first row, past the last, first column, past the last).

    entropy of the question's attention, in nats, mean over its maps: how complex the picture is for it.
    """

    fused: Tensor
    kept: Tensor
    box: tuple[int, int, int, int]
    pixels: Tensor
    entropy: Tensor


def shares(a: Tensor) -> Tensor:
    """Attention as shares of what the image gets; none at all stays none."""
    total = a.sum(-1, keepdim=True)
    return a / total.where(total > 0, 1)


def contrast(question: Tensor, general: Tensor, lam: float) -> Tensor:
    """[..., P] of attention to the image's tokens; nothing where both the general map and λ are zero."""
    below = shares(general) + lam
    return (shares(question) / below.where(below > 0, 1)).where(below > 0, 0)


def layers_of(count: int, depth: tuple[float, float]) -> list[int]:
    """Numbers of the layers in `depth`; the last one where none is.

    >>> layers_of(28, (0.7, 0.9)), layers_of(6, (0.7, 0.9)), layers_of(2, (0.7, 0.9))
    ([20, 21, 22, 23, 24, 25], [5], [1])
    """
    return [n for n in range(count) if depth[0] <= n / count <= depth[1]] or [count - 1]


def fuse(question: Tensor, general: Tensor, cfg: Config) -> Tensor:
    """[P] of maps [steps, layers, P], later steps weighing more; the longer answer's last steps have no partner."""
    steps, chosen = min(len(question), len(general)), layers_of(question.shape[1], cfg.depth)
    found = contrast(question[:steps, chosen], general[:steps, chosen], cfg.lam)
    return torch.einsum("t,tlp->p", torch.arange(1, steps + 1).to(found), found)


def heaviest(weight: Tensor, mask: Tensor, cfg: Config) -> Tensor:
    """[H, W] bool of the regions that weigh most, of equal ones the one that ends first."""
    _, number = regions(mask)[mask].unique(return_inverse=True)
    sums = torch.zeros(int(number.max()) + 1).to(weight).index_add_(0, number, weight[mask])
    count = max(cfg.regions, int(cfg.region_share * len(sums)))
    best = sums.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(mask).masked_scatter_(mask, torch.isin(number, best))


def measure(
    question: Tensor, general: Tensor, pixels: Tensor, grid: tuple[int, int], cfg: Config | None = None
) -> Focus:
    """What stays of pixels [C, H, W], from maps [steps, layers, P] of the question and the general instruction."""
    cfg, (question, general) = cfg or Config(), (at_least_float32(x) for x in (question, general))
    require(question.shape[1:] == general.shape[1:], "maps of the same layers and tokens",
            question=tuple(question.shape), general=tuple(general.shape))  # fmt: skip
    require(math.prod(grid) == question.shape[-1], "the places of the grid are the tokens", grid=grid)
    height, width = pixels.shape[-2:]
    fused = fuse(question, general, cfg)
    weight = resized(fused.view(1, *grid), (height, width))[0]
    last = weight.flatten().sort(descending=True).values[math.ceil(cfg.share * height * width - 1e-9) - 1]
    kept = heaviest(weight, weight >= EQUAL * last, cfg)
    rows, columns = (kept.any(d).nonzero().flatten() for d in (1, 0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    a = shares(question[:, layers_of(question.shape[1], cfg.depth)])
    return Focus(fused, kept, box, refined(pixels, kept, box), -torch.xlogy(a, a).sum(-1).mean())


def refined(pixels: Tensor, kept: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """[C, H, W] blank where nothing is kept, the box enlarged; as given where all is kept."""
    if bool(kept.all()):
        return pixels
    top, bottom, left, right = box
    part = (at_least_float32(pixels) * kept)[:, top:bottom, left:right]
    return resized(part, (pixels.shape[-2], pixels.shape[-1])).to(pixels.dtype)


def images(run: Any, cfg: Config) -> Tensor:
    """The picture in the place of the prompt's: both instructions are answered on it first."""
    pixels = run.pixels.reshape(-1, *run.pixels.shape[-3:])
    require(len(pixels) == 1, "a prompt with one picture", pictures=tuple(run.pixels.shape))
    found = measure(run.attention(None), run.attention(cfg.general), pixels[0], run.grid, cfg)
    return found.pixels.view_as(run.pixels)


def reference(
    question: Tensor, general: Tensor, pixels: Tensor, grid: tuple[int, int], cfg: Config | None = None
) -> Focus:
    """By the definition, number by number: sums, distances between centres, a flood that fills each region."""
    cfg, a, b = cfg or Config(), question.tolist(), general.tolist()
    layers, tokens = len(a[0]), len(a[0][0])
    inside = [n for n in range(layers) if cfg.depth[0] * layers <= n <= cfg.depth[1] * layers]
    inside = inside or [layers - 1]
    fused, spread = [0.0] * tokens, []
    for t, (here, there) in enumerate(zip(a, b, strict=False)):
        for n in inside:
            asked, other = math.fsum(here[n]) or 1.0, math.fsum(there[n]) or 1.0
            for p, (x, y) in enumerate(zip(here[n], there[n], strict=True)):
                below = y / other + cfg.lam
                fused[p] += (t + 1) * (x / asked / below if below else 0.0)
    for step in a:
        for row in (step[n] for n in inside):
            parts = [x / (math.fsum(row) or 1.0) for x in row]
            spread.append(-math.fsum(x * math.log(x) for x in parts if x))
    (height, width), wide = pixels.shape[-2:], torch.float64
    weight = stretched([fused[r * grid[1] : (r + 1) * grid[1]] for r in range(grid[0])], height, width)
    found = flooded(weight, sorted(chain(*weight))[-math.ceil(cfg.share * height * width - 1e-9)] * EQUAL)
    found.sort(key=lambda region: -math.fsum(weight[r][c] for r, c in region))
    stay = {at for region in found[: max(cfg.regions, int(cfg.region_share * len(found)))] for at in region}
    top, bottom = min(r for r, _ in stay), max(r for r, _ in stay) + 1
    left, right = min(c for _, c in stay), max(c for _, c in stay) + 1
    kept = [[(r, c) in stay for c in range(width)] for r in range(height)]
    cut = [[[x * kept[r][c] for c, x in enumerate(row)][left:right] for r, row in enumerate(plane)][top:bottom]
           for plane in pixels.tolist()]  # fmt: skip
    made = torch.tensor([stretched(plane, height, width) for plane in cut], dtype=wide)
    mean = torch.tensor(math.fsum(spread) / len(spread), dtype=wide)
    return Focus(torch.tensor(fused, dtype=wide), torch.tensor(kept), (top, bottom, left, right), made, mean)


def cases(seed: int) -> Iterable[tuple]:
    """Answers of unequal length, float32, one token, no attention at all, everything kept, one region, λ = 0."""
    g = torch.Generator().manual_seed(seed)

    def drawn(steps: tuple, layers: int, grid: tuple, size: tuple, dtype: Any = torch.float64) -> list:
        maps = [torch.rand(t, layers, grid[0] * grid[1], generator=g, dtype=dtype) ** 4 for t in steps]
        return [*maps, torch.randn(2, *size, generator=g, dtype=dtype), grid]

    yield tuple(drawn((3, 5), 10, (4, 4), (12, 12)))
    yield *drawn((4, 2), 3, (3, 5), (9, 15), torch.float32), Config(lam=0.1, share=0.3, regions=1)
    yield *drawn((1, 1), 1, (1, 1), (3, 2)), Config(lam=0.0)
    yield *drawn((2, 2), 4, (6, 6), (12, 18)), Config(lam=0.0, depth=(0, 1), regions=1, region_share=0.5)
    yield *drawn((2, 2), 4, (3, 2), (6, 6)), Config(share=1.0)
    question, general, pixels, grid = drawn((2, 1), 2, (4, 3), (8, 6))
    general[:, :, :6] = 0
    yield question, torch.zeros_like(general), pixels, grid, Config(lam=1.0, regions=2)
    yield question, general, pixels, grid, Config(lam=0.0, depth=(0, 1), regions=2, region_share=0.0)


METHOD = SteeringPage(
    config=Config,
    images=images,
    measure=measure,
    reference=reference,
    cases=cases,
    needs_image=True,
    test_settings=({"general": (5, 6, 7)},),
    card=Card(
        title="CARVE",
        paper="Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
        year=2025,
        idea="keep of a picture what the question attends to more than a general description does, and enlarge it",
        cost="the question and a general instruction are answered first, with attention written down: three answers",
        needs=("decoder-vlm", "a grid of image tokens"),
        neutral={"share": 1.0},
        caveat="the released code takes attention as it is, the page as shares of what the image gets, since layers "
        "that hardly look at the image would otherwise decide; λ is beside these shares. Where answers differ in "
        "length the steps that both have count. The code blacks out what does not stay and hands the model both "
        "pictures in the last question, the page blanks to zero of the processed pixels, which is the processor's "
        "mean colour, and hands it the refined one alone, as the paper's algorithm does. Layers 20 to 25 of 28 are "
        "given here as a share of the depth. Pixels are together if they share an edge. A box of another shape than "
        "the picture is stretched to it",
    ),
)
