"""CAKE: a token is worth the mean and the variance of the attention it gets; layers share one budget by theirs.

    s_j = pool( mean_t a_tj + γ Var_t a_tj )                                   over the last w queries t of the prompt
    P_l = H_l^(1/τ₁) V_l^(1/τ₂)       b_l = w + (P_l / Σ P) · Σ (b - w)        at most what layer l holds

with H = -Σ_t Σ_j a_tj log a_tj, how far the attention of a layer spreads, and V = Σ_j Var_t a_tj, how much it moves
from query to query, both over the tokens before the last w. A token that is looked at by some queries only is worth
more than its mean says: it will be looked at again. Layers whose attention spreads and moves get more of the budget.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.observed import observed
from regard.ops.preference import by_preference, note_preference, variance
from regard.ops.texts import as_stored, in_text


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: 1024 tokens, the mean over layers
    window: int = 32  # observing queries, which stay
    gamma: float = 200.0  # γ: how much the variance of a token's attention counts beside its mean
    pool: int = 5  # neighbours whose votes are averaged; odd
    spread: float = 1.0  # τ₁: larger, and layers whose attention spreads get less beyond the others
    motion: float = 1.0  # τ₂: larger, and layers whose attention moves get less beyond the others

    def __post_init__(self) -> None:
        require(self.window >= 2, "window >= 2", window=self.window)
        require(self.gamma >= 0, "gamma >= 0", gamma=self.gamma)
        require(self.pool >= 1 and self.pool % 2, "pool is odd", pool=self.pool)
        require(self.spread > 0, "spread > 0", spread=self.spread)
        require(self.motion > 0, "motion > 0", motion=self.motion)


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: mean and variance of the attention from the window, averaged over neighbours in the text."""
    weights, there = observed(view, cfg.window)
    note_preference(view, cfg.window, weights, there)
    mean = weights.sum(2) / there.sum(-1)[:, None, None]
    votes = view.by_cache_head(mean + cfg.gamma * variance(weights, there))
    votes = in_text(view, votes.masked_fill(view.age() < cfg.window, 0))
    return as_stored(view, F.avg_pool1d(votes, cfg.pool, stride=1, padding=cfg.pool // 2))


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < view.budget.clamp(max=cfg.window)[:, None, None]


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    phase="prefill",
    budget=lambda cfg: 1024,
    allocate=lambda view, score, cfg: by_preference(view, score, cfg.spread, cfg.motion),
    across=True,
    patterns=("causal_self",),
    card=Card(
        title="CAKE",
        paper="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences (ICLR 2025)",
        year=2025,
        idea="the prompt's last queries say, by mean and variance, what tokens are worth and how layers share a budget",
        cost="one explicit block of 32 rows per layer, and a cache that is whole until the last layer is done",
        state="budget tokens per head of the prompt in the mean over layers, and all that is generated",
        needs=("decoder-lm",),
        lineage=("snapkv", "pyramidkv"),
        neutral={"budget": 1.0},
        caveat="with several texts in a batch a layer holds memory for the longest of its rows. Released code evicts "
        "layer by layer as the shares become known, which holds less meanwhile and ends with the same tokens; goes on "
        "evicting while it generates; gives what a layer cannot hold to the others in equal parts (here by P); and "
        "sets τ₁ and τ₂ for each model and budget, 0.4 to 2.3 (here 1, its default)",
    ),
)
