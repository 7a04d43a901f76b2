"""Token-level Correlation-guided Compression: a crop with much that differs gets more of the visual tokens.

    r_i = [#{j ≠ i : cos(k_i, k_j) > threshold} > copies]       token i is redundant: many others are like it
    density = 1 - mean_i r_i                                    of an image, a crop of a page
    budget = P · density, or a share of a total in proportion to it
    the `budget` tokens of highest a stay;  each other one goes into the kept token whose k is nearest by cosine
    x_j <- Σ_{i in j} a_i x_i / Σ_{i in j} a_i                  j: a kept token and those that went into it

where k are the keys of a shallow layer of the tower, a the weights of its class token on the patches at the layer that
is projected (mean over heads), x the projected features and P how many an image has. Blank paper repeats itself and
ends up in few tokens, a page full of text keeps most of its own. Nothing is learned, and the question is not asked.

A blank crop of equal keys and one of four different ones share five tokens. The densities are 0 and 1, so that the
first has the one token that each has at least: the mean of its four by a, (4·1 + 2·2 + 3 + 5) / 8 = 2.

>>> import torch
>>> keys = [torch.ones(4, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])]
>>> x, a = torch.tensor([[1.0], [2.0], [3.0], [5.0]]), torch.tensor([0.5, 0.25, 0.125, 0.125])
>>> density(keys[0], Config(copies=1)), density(keys[1], Config(copies=1))
(0.0, 1.0)
>>> found = measure([x, x], keys, [a, a], Config(keep=5, copies=1))
>>> [r.keep.tolist() for r in found], found[0].features.tolist()
([[0], [0, 1, 2, 3]], [[2.0]])
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops import at_least_float32
from regard.ops.images import Images, Reduced, count_of, highest
from regard.ops.shares import shares, slow_shares


@dataclass(frozen=True)
class Config:
    keep: float | int | None = (
        None  # of all images' tokens; None: each image keeps the share that its density is
    )
    threshold: float = 0.8  # cosine above which two tokens are alike
    copies: int = 4  # others that a token may be like before it is redundant
    shallow: int = 1  # layer of the tower whose keys are compared, negative from the end
    layer: int | None = None  # whose attention ranks; None: the one that is projected
    without_class: Literal["refuse", "received"] = (
        "refuse"  # "received": the mean that patches receive, there
    )

    def __post_init__(self) -> None:
        if self.keep is not None:
            count_of(self.keep, 1)
        require(-1 <= self.threshold <= 1, "a cosine: -1 <= threshold <= 1", threshold=self.threshold)
        require(self.copies >= 0, "copies >= 0", copies=self.copies)


def cosines(keys: Tensor) -> Tensor:
    """[P, P] of keys [P, w]; one of zeros is at 0 to all others."""
    k = at_least_float32(keys)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(k.dtype).tiny)
    return k @ k.mT


def density(keys: Tensor, cfg: Config) -> float:
    """Share of the tokens that are not redundant."""
    alike = (cosines(keys) > cfg.threshold).fill_diagonal_(False).sum(1)
    return (alike <= cfg.copies).double().mean().item()


def budgets(densities: Sequence[float], tokens: Sequence[int], cfg: Config) -> list[int]:
    """Tokens of each image; one at least."""
    if cfg.keep is None:
        return [max(1, round(d * p)) for d, p in zip(densities, tokens, strict=True)]
    total = count_of(cfg.keep, sum(tokens))
    require(total >= len(tokens), "a token for each image", budget=total, images=len(tokens))
    high = torch.tensor(tokens)
    return shares(torch.tensor(densities) * high, torch.ones(len(tokens)), high, total).tolist()


def compressed(x: Tensor, keys: Tensor, scores: Tensor, count: int) -> Reduced:
    """So many tokens of features x [P, d], the others in the nearest of them."""
    keep, wide = highest(scores, count), at_least_float32(x)
    owner = cosines(keys)[:, keep].argmax(1)
    owner[keep] = torch.arange(count, device=x.device)
    belongs = owner == torch.arange(count, device=x.device)[:, None]  # [count, P]
    weights = scores.to(wide) * belongs
    weights = weights.where(weights.any(1, keepdim=True), belongs.to(wide))
    return Reduced(keep, (weights / weights.sum(1, keepdim=True) @ wide).to(x.dtype))


def measure(
    features: Sequence[Tensor], keys: Sequence[Tensor], scores: Sequence[Tensor], cfg: Config | None = None
) -> list[Reduced]:
    """What is left of images with features [P, d], keys [P, w] of the shallow layer and scores [P] of the deep one."""
    cfg = cfg or Config()
    found = [density(k, cfg) for k in keys]
    counts = budgets(found, [len(x) for x in features], cfg)
    images = zip(features, keys, scores, counts, strict=True)
    return [compressed(x, k, s, n) for x, k, s, n in images]


def before(images: Images, cfg: Config) -> list[Reduced]:
    tokens = sum(view.tokens for view in images)
    if cfg.keep is not None and count_of(cfg.keep, tokens) == tokens:
        return [Reduced(torch.arange(view.tokens, device=view.features.device)) for view in images]
    layers = [view.feature_layer if cfg.layer is None else cfg.layer for view in images]
    pairs = zip(images, layers, strict=True)
    scores = [at_least_float32(view.attended(layer, cfg.without_class)).mean(0) for view, layer in pairs]
    keys = [view.tower_keys(cfg.shallow) for view in images]
    return measure([view.features for view in images], keys, scores, cfg)


def reference(
    features: Sequence[Tensor], keys: Sequence[Tensor], scores: Sequence[Tensor], cfg: Config | None = None
) -> list[Reduced]:
    """By the definition, number by number; a total is handed out by a λ that bisection finds."""
    cfg, alike, dense = cfg or Config(), [], []
    for k in keys:
        rows = [[cosine(a, b) for b in k.double().tolist()] for a in k.double().tolist()]
        others = [sum(c > cfg.threshold for j, c in enumerate(row) if j != i) for i, row in enumerate(rows)]
        dense.append(sum(n <= cfg.copies for n in others))
        alike.append(rows)
    counts, found = handed_out(dense, [len(x) for x in features], cfg), []
    for x, rows, a, n in zip(features, alike, scores, counts, strict=True):
        found.append(by_hand(x.double().tolist(), rows, a.double().tolist(), n))
    return found


def cosine(a: list[float], b: list[float]) -> float:
    size = math.hypot(*a) * math.hypot(*b)
    return math.fsum(p * q for p, q in zip(a, b, strict=True)) / size if size else 0.0


def handed_out(dense: list[int], tokens: list[int], cfg: Config) -> list[int]:
    """Budgets of images with so many tokens that are not redundant."""
    if cfg.keep is None:
        return [max(1, n) for n in dense]
    share = isinstance(cfg.keep, float) and cfg.keep <= 1
    total = math.ceil(cfg.keep * sum(tokens) - 1e-9) if share else int(cfg.keep)
    return slow_shares(dense, tokens, total)


def by_hand(x: list[list[float]], rows: list[list[float]], a: list[float], count: int) -> Reduced:
    keep = sorted(sorted(range(len(a)), key=lambda i: (-a[i], i))[:count])
    members = {j: [j] for j in keep}
    for i in sorted({*range(len(a))} - {*keep}):
        members[max(keep, key=lambda j: rows[i][j])].append(i)
    new = []
    for own in members.values():
        size = [a[i] for i in own] if any(a[i] for i in own) else [1.0] * len(own)
        columns = zip(*(x[i] for i in own), strict=True)
        new.append([math.fsum(w * v for w, v in zip(size, c, strict=True)) / sum(size) for c in columns])
    return Reduced(torch.tensor(keep), torch.tensor(new, dtype=torch.float64))


def cases(seed: int) -> Iterable[tuple]:
    """Crops whose keys are near a few directions; copies; no score; keys of zeros; one token; a full crop; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        *tokens: int, spread: tuple[float, ...] = (), dtype: torch.dtype = torch.float64
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        def of(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=dtype)

        far = spread or (0.1, 0.5, 2.0)
        keys = [of(1, 6) + s * of(n, 6) for n, s in zip(tokens, far, strict=False)]
        return [of(n, 3) for n in tokens], keys, [of(n).exp() for n in tokens]

    yield *drawn(20, 20, 20), Config()
    yield *drawn(30, 12, 25), Config(keep=0.4, threshold=0.7, copies=3)
    yield *drawn(16, 16, 16, dtype=torch.float32), Config(keep=19, threshold=0.5, copies=1)
    yield *drawn(24, 1, 9, spread=(1.0, 1.0, 3.0)), Config(keep=30, copies=0)
    yield *drawn(9, 4), Config(keep=13)
    features, keys, scores = drawn(12, 12)
    keys = [torch.eye(4, dtype=torch.float64)[torch.randint(4, (12,), generator=g)] for _ in keys]
    keys[0][5:8] = 0
    scores[0][:] = 0
    for keep in (None, 7, 2):
        yield features, keys, scores, Config(keep=keep, copies=2)
    yield features[:1], keys[1:], scores[:1], Config(threshold=-1.0)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3, "without_class": "received", "threshold": 0.3, "copies": 3},),
    card=Card(
        title="Token-level Correlation-guided Compression",
        paper="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding "
        "(arXiv:2407.14439)",
        year=2024,
        idea="crops of a page share the visual tokens by how much of each is not the same as the rest of it",
        cost="P² cosines an image, one row of attention weights; the decoder reads what the densities leave",
        needs=("vision-language model", "a tower with a class token"),
        lineage=("fastervlm", "token merging"),
        neutral={"keep": 1.0},
        caveat="no code was released. What the text at hand leaves open is set here: the threshold, how many alike "
        "make a token redundant, and both layers are settings whose defaults are ours; that others go to the nearest "
        "key of the shallow layer and are averaged by attention is a choice. A review of the paper has the outliers of "
        "the deep class attention stay (by quartiles) and the rest drawn by a lower layer's; here the highest of the "
        "deep layer stay, and nothing is drawn. A budget for all images (keep) shares what the paper leaves to each "
        "image alone. Keys are those that attention reads, turned by their positions where a tower turns them. "
        "without_class='received' is not the paper's",
    ),
)
