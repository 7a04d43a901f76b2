"""VMTC: the visual tokens that a tower attends to most stay, the others become a few weighted means of their clusters.

    primary    the m tokens of highest score a           a: mean over heads of the class token's attention
    C_1 .. C_c    k-means of the others, c = k - m          started at c of them, drawn from the seed
    x_j = Σ_{i in C_j} a_i x_i / Σ_{i in C_j} a_i           stands where its member of highest a stood

Its other half, CMAI, acts on attention and is the steering page `cmai`; both can be attached together.

>>> import torch
>>> x = torch.tensor([[9.0], [1.0], [2.0], [5.0], [6.0]])
>>> found = measure(x, torch.tensor([0.5, 0.1, 0.3, 0.1, 0.0]), 1, torch.tensor([1, 3]), Config())
>>> found.keep, found.features.flatten()  # 9 stays; (0.1 · 1 + 0.3 · 2) / 0.4; (0.1 · 5 + 0 · 6) / 0.1
(tensor([0, 2, 3]), tensor([9.0000, 1.7500, 5.0000]))
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops.images import ImageView, Reduced, count_of, highest


@dataclass(frozen=True)
class Config:
    # share, or number, of each image's tokens that stay, means of clusters among them
    keep: float | int = 0.25
    primary: float = 0.75  # share of what is kept that is primary; the others are clusters
    rank: Literal["class", "received"] = "class"  # attention of the class token, or what all queries give
    layer: int | None = None  # of the tower; None: the one whose output is projected
    rounds: int = 10  # of k-means at most

    def __post_init__(self) -> None:
        count_of(self.keep, 1)
        require(0 <= self.primary <= 1, "0 <= primary <= 1", primary=self.primary)
        require(self.rounds >= 1, "a round or more", rounds=self.rounds)


def measure(x: Tensor, scores: Tensor, primary: int, starts: Tensor, cfg: Config | None = None) -> Reduced:
    """Of tokens x [P, d] with scores [P]: so many primary ones, the rest in clusters begun at the tokens `starts`."""
    cfg, kept = cfg or Config(), highest(scores, primary)
    if not len(starts):
        return Reduced(kept, x[kept])
    wide = x if x.dtype == torch.float64 else x.float()
    rest = (
        torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, kept, False).nonzero().flatten()
    )
    owner = clusters(wide[rest], wide[starts], cfg.rounds)
    owned = owner == torch.arange(len(starts), device=x.device)[:, None]  # [c, rest]
    owned = owned[owned.any(1)]
    means = weighted(wide[rest], scores[rest].to(wide), owned)
    places = rest[scores[rest].to(wide).where(owned, -torch.inf).argmax(1)]
    keep, order = torch.cat([kept, places]).sort()
    return Reduced(keep, torch.cat([x[kept], means.to(x.dtype)])[order])


def clusters(x: Tensor, centres: Tensor, rounds: int) -> Tensor:
    """[n] the centre next to each token, of equal ones the first, after k-means; one without tokens stays."""
    owner = torch.full((len(x),), -1, device=x.device)
    for _ in range(rounds):
        nearest = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if torch.equal(nearest, owner):
            break
        owner = nearest
        sums = torch.zeros_like(centres).index_add_(0, owner, x)
        count = torch.bincount(owner, minlength=len(centres))[:, None]
        centres = (sums / count).where(count > 0, centres)
    return owner


def weighted(x: Tensor, scores: Tensor, owned: Tensor) -> Tensor:
    """[c, d] means of the tokens of each cluster by their scores, equal ones where all are zero."""
    weights = scores * owned
    weights = weights.where(weights.any(1, keepdim=True), owned.to(x))
    return weights / weights.sum(1, keepdim=True) @ x


def before(images: Sequence[ImageView], cfg: Config) -> list[Reduced]:
    return [reduced(image, cfg) for image in images]


def reduced(image: ImageView, cfg: Config) -> Reduced:
    count = count_of(cfg.keep, image.tokens)
    if count == image.tokens:
        return Reduced(torch.arange(count, device=image.features.device))
    layer = image.feature_layer if cfg.layer is None else cfg.layer
    read = image.class_attention if cfg.rank == "class" else image.received
    scores, primary = read(layer).float().mean(0), round(cfg.primary * count)
    others = torch.ones(image.tokens, dtype=torch.bool).index_fill(0, highest(scores, primary).cpu(), False)
    drawn = torch.randperm(image.tokens - primary, generator=image.generator())[: count - primary]
    starts = others.nonzero().flatten()[drawn].to(image.features.device)
    return measure(image.features, scores, primary, starts, cfg)


def reference(x: Tensor, scores: Tensor, primary: int, starts: Tensor, cfg: Config | None = None) -> Reduced:
    """By the definition, a token at a time in lists of numbers."""
    cfg, given, a = cfg or Config(), x.double().tolist(), scores.double().tolist()
    order = sorted(range(len(a)), key=lambda i: (-a[i], i))
    new, rest = {i: given[i] for i in order[:primary]}, sorted(order[primary:])
    centres, members = [given[i] for i in starts.tolist()], [[] for _ in starts]
    for _ in range(cfg.rounds if centres else 0):
        members = [[] for _ in centres]
        for i in rest:
            far = [sum((p - q) ** 2 for p, q in zip(given[i], c, strict=True)) for c in centres]
            members[far.index(min(far))].append(i)
        centres = [mean(given, m, [1.0] * len(m)) if m else c for m, c in zip(members, centres, strict=True)]
    for m in filter(None, members):
        weights = [a[i] for i in m] if any(a[i] for i in m) else [1.0] * len(m)
        new[max(m, key=lambda i: a[i])] = mean(given, m, weights)
    keep = sorted(new)
    return Reduced(torch.tensor(keep), torch.tensor([new[i] for i in keep], dtype=torch.float64))


def mean(given: list[list[float]], members: list[int], weights: list[float]) -> list[float]:
    columns = zip(*(given[i] for i in members), strict=True)
    return [sum(w * v for w, v in zip(weights, c, strict=True)) / sum(weights) for c in columns]


def cases(seed: int) -> Iterable[tuple]:
    """Many tokens; no primary one; no cluster; ties and scores of zero; equal tokens, so an empty cluster; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(tokens: int, primary: int, count: int, dtype: torch.dtype = torch.float64) -> list:
        x, scores = (
            torch.randn(tokens, 4, generator=g, dtype=dtype),
            torch.rand(tokens, generator=g, dtype=dtype),
        )
        others = sorted({*range(tokens)} - {*highest(scores, primary).tolist()})
        picks = torch.randperm(len(others), generator=g)[:count].tolist()
        return [x, scores, primary, torch.tensor([others[i] for i in picks], dtype=torch.long)]

    yield *drawn(40, 6, 5), Config()
    yield *drawn(12, 0, 3), Config(rounds=1)
    yield tuple(drawn(9, 4, 0))
    yield *drawn(30, 3, 4, torch.float32), Config()
    x, scores, _, starts = drawn(10, 0, 3)
    yield x, torch.zeros_like(scores), 2, starts.clamp(min=2).unique(), Config()
    x, scores = torch.tensor([9.0, 8.0, 8.0, 1.0, -1.0, 3.0]), torch.tensor([1.0, 0.5, 0.5, 0.2, 0.1, 0.3])
    yield x.double()[:, None], scores.double(), 1, torch.tensor([1, 2, 3]), Config()


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="VMTC",
        paper="Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
        year=2024,
        idea="keep the tokens that the class token attends to, and a weighted mean of each cluster of the others",
        cost="k-means of the tokens that are not kept, P · c · d a round, once an image",
        needs=("vlm", "vit"),
        lineage=("token merging",),
        neutral={"keep": 1.0},
        caveat="no code was found, and of the paper its abstract: ranking by the class token's attention, the share of "
        "primary tokens, k-means after the projector, weights by the same scores and the place of a mean are choices "
        "made here. Equal tokens leave clusters empty, and then fewer tokens stay than asked for",
    ),
)
