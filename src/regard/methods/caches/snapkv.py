"""SnapKV: the last queries of the prompt vote which of its tokens are worth keeping.

    s_j = pool_{j <= N-w}( Σ_{t > N-w} softmax(q_t K)_j )      w observing queries, pooled over p neighbours before them
    keep the w observing tokens and, by head, the budget's best s

where the pattern of attention that the end of a prompt shows goes on through the answer; pooling keeps whole
phrases instead of single tokens. The prompt is compressed once; what is generated stays.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.texts import as_stored, in_text


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: 1024 tokens
    window: int = 32  # observing queries
    pool: int = 7  # neighbours that share a vote; odd

    def __post_init__(self) -> None:
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.pool >= 1 and self.pool % 2, "pool is odd", pool=self.pool)


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: attention received from the observing queries, pooled over the tokens before them."""
    # the window stays in any case; what it gives to itself would lift the tokens next to it
    votes = view.received(newest=cfg.window).masked_fill(view.age() < cfg.window, 0)
    # neighbours are those of the text, not of the cache
    pooled = F.max_pool1d(in_text(view, votes), cfg.pool, stride=1, padding=cfg.pool // 2)
    return as_stored(view, pooled)


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < view.budget.clamp(max=cfg.window)[:, None, None]


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    phase="prefill",
    budget=lambda cfg: 1024,
    patterns=("causal_self",),
    card=Card(
        title="SnapKV",
        paper="SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024)",
        year=2024,
        idea="the prompt's last queries choose its keys once, before the first token is generated",
        cost="one explicit block of 32 rows per layer, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="released code averages or takes the maximum over neighbours, by a switch; here it is the maximum. "
        "It copies a KV head for each query head of a group, and each keeps its own tokens; here the query heads that "
        "share a KV head vote together: their weights are summed, and the group keeps one set",
    ),
)
