"""QuoTA: one budget of visual tokens, shared among the frames of a prompt by what the question has to do with each.

    w_i = s_i ^ power                                    s_i: how likely a scorer says yes of frame i
    q_i = clip(λ w_i, minimum, P_i) with Σ q_i = budget    in whole tokens by the largest remainders
    frame i -> q_i tokens, read bilinearly from its grid of P_i

The question is first turned into what to look for ("where is the 7 ?" -> "is there a 7 ?"); `affirmative` makes scores
of a scorer's answers. A quota is laid out in rows of equal or nearly equal length, so that no token of it is lost.

>>> import torch
>>> quotas(torch.tensor([0.9, 0.3, 0.1]), torch.tensor([64, 64, 64]), 20, Config())  # 1, and 17.1 : 1.9
tensor([17,  2,  1])
>>> keep, weights = layout(5, (4, 4))  # a row of two, a row of three
>>> keep
tensor([ 5,  7, 12, 14, 15])
>>> weights[0].view(4, 4)[:2, :2]  # centre at 0.5, 0.5 of the grid: the mean of four
tensor([[0.2500, 0.2500],
        [0.2500, 0.2500]], dtype=torch.float64)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops.images import ImageView, Reduced, count_of
from regard.ops.shares import shares

Grid = tuple[int, int]


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.18  # of all frames' tokens; the released 64 · 196 of 96 · 729
    power: float = 2.0  # 0: every frame gets the same
    minimum: int = 1  # tokens of a frame at least
    relevance: tuple[float, ...] | None = None  # scores of the images in order, where these carry none

    def __post_init__(self) -> None:
        count_of(self.keep, 1)
        require(self.power >= 0, "power >= 0", power=self.power)
        require(self.minimum >= 0, "a minimum of no token or more", minimum=self.minimum)


def affirmative(logits: Tensor, yes: int) -> Tensor:
    """[F] the probability of `yes` in a scorer's next-token logits [F, V], one row for each frame."""
    return logits.float().softmax(-1)[..., yes]


def quotas(relevance: Tensor, tokens: Tensor, budget: int, cfg: Config) -> Tensor:
    """[F] whole numbers that sum to the budget, from scores [F] and tokens [F] of the frames."""
    scores, high = relevance.double(), tokens.double()
    require(bool((scores >= 0).all()), "scores of frames are finite, 0 or more", relevance=relevance.tolist())
    low = high.clamp(max=cfg.minimum)
    fits = low.sum() <= budget <= high.sum()
    rule = "the budget holds the minimum of each frame, and no more than there is"
    require(bool(fits), rule, budget=budget, minimum=cfg.minimum, frames=len(high))
    return shares(scores**cfg.power, low, high, budget)


def layout(quota: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """keep [q] the token under the centre of each new one, and [q, P] weights that make the new ones of the old."""
    rows, columns = grid
    lines = math.floor(math.sqrt(quota * rows / columns + 0.25) + 0.5)
    lines = min(max(lines, math.ceil(quota / columns)), rows, quota)
    keep, weights = [], []
    for i, row in enumerate(along(rows, lines)):
        count = (i + 1) * quota // lines - i * quota // lines
        weights.append((row[None, :, None] * along(columns, count)[:, None]).flatten(1))
        keep.append(under(rows, lines)[i] * columns + under(columns, count))
    return torch.cat(keep), torch.cat(weights)


def under(size: int, count: int) -> Tensor:
    """[count] in which of `size` cells the centre of each of `count` equal parts lies."""
    return (2 * torch.arange(count) + 1) * size // (2 * count)


def along(size: int, count: int) -> Tensor:
    """[count, size] bilinear weights of the cells of one axis at the centre of each part; each row sums to 1."""
    cell = torch.arange(size, dtype=torch.float64)
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) * size / count - 0.5
    return (1 - (centre[:, None] - cell).abs()).clamp(min=0)


def measure(
    features: Sequence[Tensor], grids: Sequence[Grid], relevance: Tensor, cfg: Config | None = None
) -> list[Reduced]:
    """What is left of frames [P, d] on grids, by their scores [F]."""
    cfg, tokens = cfg or Config(), torch.tensor([len(x) for x in features])
    shares = quotas(relevance, tokens, count_of(cfg.keep, int(tokens.sum())), cfg).tolist()
    return [resized(x, grid, q) for x, grid, q in zip(features, grids, shares, strict=True)]


def resized(x: Tensor, grid: Grid, quota: int) -> Reduced:
    if not quota:
        return Reduced(torch.arange(0, device=x.device), x[:0])
    keep, weights = layout(quota, grid)
    wide = x if x.dtype == torch.float64 else x.float()
    return Reduced(keep.to(x.device), (weights.to(wide) @ wide).to(x.dtype))


def before(images: Sequence[ImageView], cfg: Config) -> list[Reduced]:
    tokens = sum(image.tokens for image in images)
    if count_of(cfg.keep, tokens) == tokens:
        return [Reduced(torch.arange(image.tokens, device=image.features.device)) for image in images]
    grids = [image.grid or (1, image.tokens) for image in images]
    return measure([image.features for image in images], grids, torch.tensor(scores_of(images, cfg)), cfg)


def scores_of(images: Sequence[ImageView], cfg: Config) -> list[float]:
    """What the images carry, else what is set; of a single one it does not matter."""
    if len(images) == 1:
        return [1.0]
    known = [image.relevance for image in images if image.relevance is not None] or list(cfg.relevance or ())
    require(len(known) == len(images), "QuoTA shares by the relevance of each image", relevance=known)
    return known


def reference(
    features: Sequence[Tensor], grids: Sequence[Grid], relevance: Tensor, cfg: Config | None = None
) -> list[Reduced]:
    """By the definition: λ by bisection, tokens handed out one by one, each new token from its four neighbours."""
    cfg, tokens = cfg or Config(), [len(x) for x in features]
    total = sum(tokens)
    budget = math.ceil(cfg.keep * total - 1e-9) if isinstance(cfg.keep, float) else min(cfg.keep, total)
    weights = [s**cfg.power for s in relevance.tolist()]
    weights = [max(w, 1e-9 * max(weights)) if max(weights) else 1.0 for w in weights]

    def shared(size: float) -> list[float]:
        return [min(max(size * w, min(cfg.minimum, p)), p) for w, p in zip(weights, tokens, strict=True)]

    low, high = 0.0, 2 * total / min(weights)
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shared(middle)) < budget else (low, middle)
    exact = shared(high)
    given = [math.floor(x + 1e-7) for x in exact]
    while sum(given) < budget:
        given[max(range(len(given)), key=lambda i: round(exact[i] - given[i], 7))] += 1
    return [by_hand(x, grid, q) for x, grid, q in zip(features, grids, given, strict=True)]


def by_hand(x: Tensor, grid: Grid, quota: int) -> Reduced:
    (rows, columns), given = grid, x.double()
    lines = max((r for r in range(1, rows + 1) if r * (r - 1) * columns <= quota * rows), default=1)
    lines = min(max(lines, -(-quota // columns)), quota)
    keep, made = [], []
    for i in range(lines):
        count = (i + 1) * quota // lines - i * quota // lines
        for j in range(count):
            y, z = (i + 0.5) * rows / lines, (j + 0.5) * columns / count
            keep.append(int(y) * columns + int(z))
            y, z = y - 0.5, z - 0.5
            near = [(a, b) for a in range(rows) for b in range(columns) if abs(y - a) < 1 and abs(z - b) < 1]
            made.append(sum((1 - abs(y - a)) * (1 - abs(z - b)) * given[a * columns + b] for a, b in near))
    return Reduced(torch.tensor(keep, dtype=torch.long), torch.stack(made) if made else given[:0])


def cases(seed: int) -> Iterable[tuple]:
    """Frames of one and of several sizes; ties; scores of zero; full frames; a frame of one token; float32; a row."""
    g = torch.Generator().manual_seed(seed)

    def frames(*grids: Grid, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Grid]]:
        return [torch.randn(r * c, 3, generator=g, dtype=dtype) for r, c in grids], list(grids)

    yield *frames((4, 4), (4, 4), (4, 4)), torch.rand(3, generator=g), Config(keep=0.4, minimum=3)
    yield *frames((6, 4), (1, 1), (3, 5)), torch.rand(3, generator=g, dtype=torch.float64), Config(keep=23)
    yield *frames((4, 4), (4, 4), (4, 4), (4, 4)), torch.full((4,), 0.5), Config(keep=22, minimum=3)
    yield *frames((4, 4), (4, 4), (4, 4)), torch.tensor([1.0, 0.0, 0.0]), Config(keep=21, minimum=0)
    yield *frames((5, 5), (5, 5), dtype=torch.float32), torch.zeros(2), Config(keep=11, power=1.0)
    yield *frames((1, 9), (4, 6)), torch.rand(2, generator=g), Config(keep=0.5, power=0.0)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 0.3, "relevance": (0.9, 0.4)},),
    card=Card(
        title="QuoTA",
        paper="QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
        year=2025,
        idea="a frame that has to do with the question gets more of the visual tokens that all frames share",
        cost="a scorer's forward for each frame, which counts against what is saved; resizing is one small product",
        needs=("vlm", "several images of a prompt", "their relevance"),
        lineage=("bilinear resizing",),
        neutral={"keep": 1.0},
        caveat="the released code rounds every quota down, lays it out as a rectangle that fits and drops frames of "
        "quota 0, so that its tokens do not sum to the budget; here they do, rows may differ by one token, and each "
        "frame has a minimum. There a frame may grow beyond its grid, here never. New tokens stand at the positions "
        "of those under their centres; there they are numbered anew, with a token more for each row. Scores are the "
        "caller's: there the answering model lists objects to look for and a smaller model is asked about each frame",
    ),
)
