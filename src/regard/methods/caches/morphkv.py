"""MorphKV: the attention of the most recent tokens says at every step which older ones stay.

    F_j = Σ_{t > n-w} a_tj   or   max_{t > n-w} a_tj        a_t = softmax(q_t K) over what is stored, by cache head
    keep the last w tokens and, by head, the budget's best F

where n is the length of the text and w the window. Sums of all attention so far favour what came first, since more
queries saw it; here only the last w queries have a vote, each step anew, so what is kept follows the text as it goes.
The cache stays at its budget from the first step to the last. Grouped query heads vote together.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.recent import recent_weights, remember


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # the window included; None: 2000 tokens
    window: int = 32  # tokens that vote and stay
    fuse: Literal["sum", "max"] = "sum"  # of the votes over the window

    def __post_init__(self) -> None:
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.fuse in ("sum", "max"), 'fuse is "sum" or "max"', fuse=self.fuse)


def observe(view: View, cfg: Config) -> None:
    remember(view, cfg.window)


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n] the votes of the window's queries, and of the layers that read these slots too."""
    votes = view.by_cache_head(recent_weights(view)[0])  # [B, G, w, n]
    others = [other.received(newest=1) for other in view.readers]
    if cfg.fuse == "sum":
        return votes.sum(2) + sum(others)
    fused = votes.amax(2)
    for other in others:
        fused = fused.maximum(other)
    return fused


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < view.budget.clamp(max=cfg.window)[:, None, None]


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    always=always,
    budget=lambda cfg: 2000,
    patterns=("causal_self",),
    card=Card(
        title="MorphKV",
        paper="Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs (ICML 2025)",
        year=2025,
        idea="the last tokens' attention chooses the older ones anew at every step; the cache never grows",
        cost="weights of w queries over what is stored, at every step",
        state="budget tokens and w queries per head",
        needs=("decoder-lm",),
        lineage=("snapkv", "h2o"),
        neutral={"budget": 1.0},
        caveat="released code leaves the prompt whole until the first generated token, holds the scores of the window "
        "as they were when it was read, sums those of grouped query heads before the softmax, and takes it over the "
        "tokens before the window alone; the newest token stays beside the window there, here it is part of it",
    ),
)
