"""DivPrune: visual tokens that are as far from each other as can be; the nearest pair of the kept ones decides.

    max over sets S of k tokens of  min_{i ≠ j ∈ S} d(x_i, x_j),        d(x, y) = 1 - x·y / (|x| |y|)
    solved greedily: first the token whose nearest other is farthest, then again and again the one whose nearest kept
    token is farthest

where x are the projected features and k the budget. What attention ranks highest may be the same thing many times;
here a second copy is the last to stay. Neither the question nor any attention is asked.

>>> import torch
>>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])  # nearest others at 0.2, 0.04, 0.2, 0.04
>>> measure(x, Config(keep=2)), measure(x, Config(keep=3))  # 0, then 2 at 1, then 1 at min(0.2, 0.4) before 3
(tensor([0, 2]), tensor([0, 1, 2]))
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.tokens import TokensPage
from regard.ops.images import Images, Reduced, count_of


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of each image's tokens that stay

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def distances(features: Tensor) -> Tensor:
    """[P, P] cosine distances; a feature of zeros is at 1 from every other."""
    x = features if features.dtype == torch.float64 else features.float()
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return 1 - x @ x.mT


def measure(features: Tensor, cfg: Config | None = None) -> Tensor:
    """[k] numbers of the tokens that stay, ascending, of features [P, d]."""
    cfg, apart = cfg or Config(), distances(features)
    others = apart.clone().fill_diagonal_(torch.inf)
    chosen = [others.amin(0).argmax()]  # argmax gives the first of equal ones
    nearest = apart.new_full((len(apart),), torch.inf)
    for _ in range(count_of(cfg.keep, len(apart)) - 1):
        nearest = torch.minimum(nearest, apart[chosen[-1]])
        nearest[chosen[-1]] = -torch.inf
        chosen.append(nearest.argmax())
    return torch.stack(chosen).sort().values


def before(images: Images, cfg: Config) -> list[Reduced]:
    return [Reduced(measure(view.features, cfg)) for view in images]


def reference(features: Tensor, cfg: Config | None = None) -> Tensor:
    """By the definition, number by number: every step looks at all that is kept anew."""
    rows, cfg = features.double().tolist(), cfg or Config()

    def apart(a: list[float], b: list[float]) -> float:
        size = math.hypot(*a) * math.hypot(*b)
        return 1 - (math.fsum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0)

    kept: list[int] = []
    while len(kept) < min(len(rows), count_of(cfg.keep, len(rows))):
        best, far = -1, -math.inf
        for i in (i for i in range(len(rows)) if i not in kept):
            near = min((apart(rows[i], rows[j]) for j in kept or range(len(rows)) if j != i), default=0.0)
            if near > far:
                best, far = i, near
        kept.append(best)
    return torch.tensor(sorted(kept))


def cases(seed: int) -> Iterable[tuple]:
    """Tokens that differ, copies, a feature of zeros, one token, all tokens; lengths of vectors; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(tokens: int, width: int) -> Tensor:
        return torch.randn(tokens, width, generator=g, dtype=torch.float64)

    yield (drawn(64, 16),)
    yield drawn(30, 8).float(), Config(keep=0.1)
    yield drawn(40, 3) * 10 ** drawn(40, 1), Config(keep=12)
    yield drawn(1, 4), Config(keep=0.5)
    yield drawn(9, 4), Config(keep=1.0)
    yield torch.cat([drawn(6, 4), torch.zeros(1, 4)]), Config(keep=4)
    axes = torch.eye(5, dtype=torch.float64)[
        torch.randint(0, 5, (20,), generator=g)
    ]  # exact distances: 0 and 1
    yield axes, Config(keep=4)
    yield axes, Config(keep=15)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3},),
    card=Card(
        title="DivPrune",
        paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        year=2025,
        idea="tokens stay that are farthest from each other in cosine distance, chosen one after the other",
        cost="P² distances and k steps of P comparisons before the decoder",
        needs=("vision-language model",),
        neutral={"keep": 1.0},
        caveat="greedy, as the released code: the best set is not guaranteed. Kept tokens do not come up again, as "
        "they can in the released code once only copies are left; its budget is rounded to the nearest, here up. "
        "The paper's 0.098 of the tokens is keep=0.098",
    ),
)
