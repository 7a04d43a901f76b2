"""Layer entropy: layers share one budget by how far their attention spreads and how much it moves (CAKE's allocation).

    H_l = - Σ_t Σ_j a_tj log a_tj     V_l = Σ_j Var_t(a_tj)      over the last w queries t and the tokens j before them
    P_l = H_l^(1/τ₁) V_l^(1/τ₂)       b_l = w + (P_l / Σ P) · Σ (b - w)        at most what the layer holds

where some layers look at many tokens, and at others with every query, and some at a few that stay the same: an equal
part starves the former. Nothing goes before the last layer was attended to, since its P is in every share.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, allocating
from regard.ops import View
from regard.ops.observed import observed
from regard.ops.preference import by_preference, note_preference


@dataclass(frozen=True)
class Config:
    queries: int = 32  # last queries of a prompt whose attention is measured
    spread: float = 1.0  # τ₁: larger, and layers whose attention spreads get less beyond the others
    motion: float = 1.0  # τ₂: larger, and layers whose attention moves get less beyond the others

    def __post_init__(self) -> None:
        require(self.queries >= 2, "queries >= 2", queries=self.queries)
        require(self.spread > 0, "spread > 0", spread=self.spread)
        require(self.motion > 0, "motion > 0", motion=self.motion)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    def allocate(view: View, score: Tensor) -> Tensor:
        return by_preference(view, score, cfg.spread, cfg.motion)

    below = allocating("layer_entropy", page, allocate, across=True)

    def score(view: View, own: Any) -> Tensor:
        note_preference(view, cfg.queries, *observed(view, cfg.queries))
        return page.score(view, own)  # type: ignore[misc]

    return replace(below, score=score)


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="Layer entropy",
        paper="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences (ICLR 2025)",
        year=2025,
        idea="the budget of all layers is shared by the entropy and the variance of their attention",
        cost="the attention of the last queries once more, and a cache that is whole until the last layer is done",
        state="as many tokens as the method below, in unequal parts by layer",
        needs=("decoder-lm",),
        lineage=("snapkv", "pyramidkv"),
        caveat="with several texts in a batch a layer holds memory for the longest of its rows. CAKE's own score is "
        "the page cake. Nothing goes before the last layer is done; CAKE's cascade, which evicts layer by layer on "
        "the way, ends with the same tokens and holds less meanwhile",
    ),
)
