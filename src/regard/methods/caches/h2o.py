"""H2O: keep the heavy hitters, the tokens that received most attention so far, beside the most recent.

    A_j = Σ_{t ≥ j} softmax(q_t K)_j          attention received, summed over the steps while j was stored
    keep the recent half of the budget, and of the others those with the largest A, by head

where a small set of tokens collects most of the attention mass, step after step (Zhang et al., 2023: 20 % of the
cache at little loss). Grouped heads share a stored key, so A sums over the query heads that read it.
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # heavy hitters and recent tokens together; None: 0.2
    recent: float = 0.5  # share of the budget for the most recent tokens

    def __post_init__(self) -> None:
        require(0 <= self.recent < 1, "0 <= recent < 1", recent=self.recent)


def observe(view: View, cfg: Config) -> None:
    view.notes("received").add_(view.received())


def score(view: View, cfg: Config) -> Tensor:
    return view.notes("received")


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < (view.budget.double() * cfg.recent - 1e-9).ceil().clamp(min=1)[:, None, None]


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    always=always,
    budget=lambda cfg: 0.2,
    patterns=("causal_self",),
    card=Card(
        title="H2O: Heavy-Hitter Oracle",
        paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (NeurIPS 2023)",
        year=2023,
        idea="accumulated attention decides which old tokens stay; half of the budget is recent tokens",
        cost="explicit weights of every step, in blocks of rows, to accumulate them",
        state="budget tokens per head, and one number each",
        needs=("decoder-lm",),
        lineage=("softmax",),
        neutral={"budget": 1.0},
        caveat="early tokens are seen by more queries and so collect more; the paper's sum has this bias too",
    ),
)
