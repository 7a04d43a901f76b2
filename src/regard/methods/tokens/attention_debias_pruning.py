"""Attention debiasing: a pruner's attention scores without their trend over positions, and none for padding.

    s_i = mean_h A[h, last, i]        s̃_i = s_i · w_i · m_i        kept: the k highest s̃_i of those with m_i = 1
    w_i = min_j t(u_j) / t(u_i)       m_i = 0 where more than half of patch i is padding, else 1

u_i in [0, 1] is the place of token i in its image, t the trend of mean attention over places, fitted offline on other
images: later tokens, those at the bottom, are attended to more whatever they show, and padding is a sink. t is an
exponential (a line through the logarithms) or a cubic. The pruner here is FastV: once, after the second layer.

>>> import torch
>>> attention = torch.tensor([[0.2, 0.1, 0.3, 0.8]])  # [H, P]; the trend doubles from place to place: t = 8^u
>>> cfg = Config(keep=2, trend=(math.log(8),))
>>> found = measure(attention, torch.zeros(4, dtype=torch.long), torch.tensor([0.0, 0.0, 0.5, 0.9]), cfg)
>>> [round(s, 4) for s in found["debiased"].tolist()]  # 0.2 / 1, 0.1 / 2, 0.3 / 4, padding
[0.2, 0.05, 0.075, 0.0]
>>> found["kept"]
tensor([0, 2])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops import at_least_float32
from regard.ops.images import LayerView, count_of, highest

DEGREES = {"exponential": 1, "cubic": 3}
Calibration = tuple[Tensor, Tensor | None]  # scores [images, P] and padding [images, P] of other images


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # visual tokens of a text, a share or a number
    layers: int = 2  # that see all of them
    trend: tuple[float, ...] = ()  # what `fit` gives; empty: no trend is taken out
    family: str = "exponential"  # of the trend t: one number in `trend`; or "cubic": three
    padding: float = 0.5  # a larger share of a patch makes it padding

    def __post_init__(self) -> None:
        require(self.keep > 0, "keep > 0", keep=self.keep)
        require(self.layers >= 1, "a layer or more sees all visual tokens", layers=self.layers)
        require(self.family in DEGREES, f"family is one of {[*DEGREES]}", family=self.family)
        sizes = (0, DEGREES[self.family])
        require(len(self.trend) in sizes, f"as many numbers in trend as {sizes}", trend=self.trend)
        require(0 <= self.padding <= 1, "padding is a share", padding=self.padding)


def fit(scores: Tensor, padding: Tensor | None, cfg: Config) -> tuple[float, ...]:
    """The trend of scores [images, P]: of the mean at each place over the images where it is no padding.

    (b) of t = exp(b u), or (c1, c2, c3) of t = 1 + c1 u + c2 u² + c3 u³, by least squares.
    """
    seen = torch.ones_like(scores, dtype=torch.bool) if padding is None else padding <= cfg.padding
    there = seen.any(0)
    u = places(torch.zeros(scores.shape[1], dtype=torch.long))[there]
    require(len(u) > DEGREES[cfg.family], "more places than the trend has numbers", places=len(u))
    y = (scores.double() * seen).sum(0)[there] / seen.sum(0)[there]
    require(bool((y > 0).all()), "mean scores > 0", smallest=float(y.min()))
    powers = u[:, None] ** torch.arange(DEGREES[cfg.family] + 1)
    c = torch.linalg.lstsq(powers, (y.log() if cfg.family == "exponential" else y)[:, None]).solution[:, 0]
    begins = 1.0 if cfg.family == "exponential" else c[0].item()
    require(begins > 0, "the cubic begins above 0", begins=begins)
    return tuple((c[1:] / begins).tolist())


def places(image: Tensor) -> Tensor:
    """[P] in float64: 0 at the first token of an image, 1 at its last; of one token alone 0."""
    counts = image.bincount()
    first = counts.cumsum(0) - counts
    nth = torch.arange(len(image), device=image.device) - first[image]
    return nth.double() / (counts[image] - 1).clamp(min=1)


def weights(u: Tensor, cfg: Config) -> Tensor:
    """w [P], at most 1, at places u [P]."""
    if not cfg.trend:
        return torch.ones_like(u)
    if cfg.family == "exponential":
        t = (cfg.trend[0] * u).exp()
    else:
        t = 1 + sum(c * u ** (n + 1) for n, c in enumerate(cfg.trend))
    require(bool((t > 0).all()), "the trend is above 0 everywhere", smallest=float(t.min()))
    return t.min() / t


def measure(
    attention: Tensor, image: Tensor, padding: Tensor | None, cfg: Config, others: Calibration | None = None
) -> dict[str, Tensor]:
    """Debiased scores [P] and the numbers of tokens kept, ascending, of attention [H, P] on tokens of `image` [P].

    others: what the trend is fitted on first, in the place of cfg's.
    """
    if others is not None:
        cfg = Config(cfg.keep, cfg.layers, fit(*others, cfg), cfg.family, cfg.padding)
    scores = at_least_float32(attention).mean(0)
    real = torch.ones_like(image, dtype=torch.bool) if padding is None else padding <= cfg.padding
    debiased = scores * weights(places(image), cfg).to(scores) * real
    count = min(count_of(cfg.keep, len(image)), int(real.sum()))
    return {
        "debiased": debiased.to(attention.dtype),
        "kept": highest(debiased.where(real, -torch.inf), count),
    }


def after(view: LayerView, cfg: Config) -> Tensor | None:
    require(cfg.layers <= view.layers, "layers <= the model's", layers=cfg.layers, of=view.layers)
    if view.layer != cfg.layers - 1:
        return None
    attention, tokens = view.weights("last")[:, 0], len(view.image)
    whole = attention.new_zeros(len(attention), tokens).index_copy(1, view.alive, attention)
    # what is gone counts as padding of more than a whole patch: it never comes back
    padding = attention.new_full((tokens,), 2.0)
    padding[view.alive] = 0.0 if view.padding is None else view.padding[view.alive].to(padding)
    kept = measure(whole, view.image, padding, cfg)["kept"]
    return None if len(kept) == len(view.alive) else kept


def reference(
    attention: Tensor, image: Tensor, padding: Tensor | None, cfg: Config, others: Calibration | None = None
) -> dict[str, Tensor]:
    """By the definition, number by number; the trend from the normal equations in fractions."""
    trend = list(cfg.trend) if others is None else fitted(others, cfg)
    owner, blank = image.tolist(), [0.0] * len(image) if padding is None else padding.tolist()
    u = [(owner[:i].count(n) / max(owner.count(n) - 1, 1)) for i, n in enumerate(owner)]
    if cfg.family == "exponential":
        t = [math.exp(sum(trend) * x) for x in u]
    else:
        t = [1 + sum(c * x**n for n, c in enumerate(trend, 1)) for x in u]
    mean = [math.fsum(column) / len(column) for column in attention.double().T.tolist()]
    real = [i for i, share in enumerate(blank) if share <= cfg.padding]
    debiased = [s * min(t) / x if i in real else 0.0 for i, (s, x) in enumerate(zip(mean, t, strict=True))]
    budget = math.ceil(cfg.keep * len(mean)) if isinstance(cfg.keep, float) else cfg.keep
    kept = sorted(sorted(real, key=lambda i: (-debiased[i], i))[:budget])
    return {
        "debiased": torch.tensor(debiased, dtype=torch.float64),
        "kept": torch.tensor(kept, dtype=torch.long),
    }


def fitted(others: Calibration, cfg: Config) -> list[float]:
    scores, degree = others[0].tolist(), DEGREES[cfg.family]
    blank = [[0.0] * len(row) for row in scores] if others[1] is None else others[1].tolist()
    points = []
    for i in range(len(scores[0])):
        seen = [row[i] for row, share in zip(scores, blank, strict=True) if share[i] <= cfg.padding]
        if seen:
            y = math.fsum(seen) / len(seen)
            points.append((Fraction(i, len(scores[0]) - 1), Fraction(math.log(y) if degree == 1 else y)))
    rows = [[sum(x ** (a + b) for x, _ in points) for b in range(degree + 1)] for a in range(degree + 1)]
    rows = [[*row, sum(y * x**a for x, y in points)] for a, row in enumerate(rows)]
    for a, pivot in enumerate(rows):  # elimination; a Gram matrix needs no exchange of rows
        pivot[:] = [value / pivot[a] for value in pivot]
        for row in rows[:a] + rows[a + 1 :]:
            row[:] = [value - row[a] * p for value, p in zip(row, pivot, strict=True)]
    return [float(row[-1] if degree == 1 else row[-1] / rows[0][-1]) for row in rows[1:]]


def cases(seed: int) -> Iterable[tuple]:
    """Both families fitted on padded images; no trend; two images; ties; one token; padding alone; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return 0.1 + torch.rand(*shape, generator=g, dtype=dtype)

    slope, one = torch.linspace(0, 2, 12, dtype=torch.float64).exp(), torch.zeros(12, dtype=torch.long)
    blank = torch.tensor([0.9, 0.51, 0.5] + 9 * [0.0], dtype=torch.float64)
    others = (drawn(6, 12) * slope, torch.stack([blank, blank.flip(0), *4 * [0 * blank]]))
    yield drawn(3, 12) * slope, one, blank, Config(keep=4), others
    yield drawn(3, 12) * slope, one, blank, Config(keep=0.5, family="cubic", padding=0.9), others
    yield drawn(2, 12), one, None, Config(), (others[0], None)
    yield drawn(2, 12), one, blank, Config(keep=12)
    yield drawn(2, 12, dtype=torch.float32), one.where(blank > 0, 1), None, Config(keep=3, trend=(1.0,))
    yield torch.ones(1, 12), one, blank, Config(keep=5)
    yield drawn(2, 1), one[:1], None, Config(trend=(2.0, 1.0, -0.5), family="cubic")
    yield drawn(2, 12), one, torch.ones(12), Config(trend=(-1.0,))


METHOD = TokensPage(
    config=Config,
    after=after,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"layers": 1, "keep": 0.5},),
    card=Card(
        title="Attention debiasing",
        paper="Attention Debiasing for Token Pruning in Vision Language Models",
        year=2025,
        idea="divide a pruner's attention scores by their fitted trend over positions, and never keep padding",
        cost="a multiplication for each visual token, and one layer's attention of the last token; the trend is fitted "
        "once, on other images",
        needs=("vision-language model", "a trend fitted on other images"),
        lineage=("FastV",),
        neutral={"keep": 1.0, "padding": 1.0},
        caveat="no trend is taken out until `fit` gave one, since it is a model's and a layer's own. The released code "
        "has files of weights, no fit: FastV's is the inverse of a cubic, those of PyramidDrop, HiMAP, SparseVLM and "
        "TokenCarve, one for each benchmark, are exponentials that fall to 0.07 .. 0.53; its limit of "
        "padding is 0.5 with FastV, 0.01 with PyramidDrop. Where fewer than k tokens are no padding, k shrinks, as "
        "there. It multiplies padding by 0 and may keep it among tokens without attention; here it is never kept. "
        "The pruner is FastV; places are counted in each image alone",
    ),
)
