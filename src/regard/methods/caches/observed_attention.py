"""Observed attention: how much attention a token of the prompt received, on average over those that could give it any.

    s_j = (1 / (N - j)) Σ_{t ≥ j} softmax(q_t K)_j      N - j queries of a prompt of N tokens see token j
    keep the budget's best s, by head, after the prompt

where H2O's sum favours early tokens, which more queries see, the mean compares tokens by what they get from one query.
The newest tokens are seen by few, so their means rest on few weights.
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.kinds.cache import CachePage
from regard.ops import Budget, View


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text


def observe(view: View, cfg: Config) -> None:
    if view.phase == "prefill" and view.over():
        view.received()  # together with the step's attention, not after it


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: of this turn's queries, those that see a token are those that came with it or after it."""
    asking = view.asking()
    asked = view.budget.new_tensor([view.new]) if asking is None else asking.sum(-1)
    seen_by = (view.age() + 1).minimum(asked[:, None, None]) + len(view.readers)
    return view.received() / seen_by.clamp(min=1)


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Observed attention",
        paper="ObservedAttentionPress of NVIDIA kvpress, after the heavy hitters of H2O",
        year=2024,
        idea="the mean attention that a token received from the prompt's queries, each token by those that saw it",
        cost="explicit weights of the whole prompt, in blocks of rows",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="no paper of its own. The newest token stays in any case. A later prompt scores what is stored by its "
        "own queries alone; layers that read these keys too vote with their last query",
    ),
)
