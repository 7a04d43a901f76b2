"""Leverage: tokens whose keys no mixture of the others replaces stay.

    s_j = x̄_jᵀ (X̄ᵀX̄ + ε I)⁻¹ x̄_j        X [n, D] keys before rotary positions, X̄ = X less its mean over tokens
    keep the budget's best s, by head, after the prompt

where s is the statistical leverage of a row: 1 for a key in a direction of its own, near 0 where many lie. It is the
same under every change of basis, so channels of large numbers do not decide. No query is asked: what stays serves
any question. ε is small and keeps the inverse finite where there are fewer tokens than channels.
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.leverage import leverage, rounded


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    ridge: float = 0.01  # ε

    def __post_init__(self) -> None:
        require(self.ridge > 0, "ridge > 0", ridge=self.ridge)


def score(view: View, cfg: Config) -> Tensor:
    return rounded(view.by_cache_head(leverage(view.unrotated_keys(), view.hold(), cfg.ridge)))


METHOD = CachePage(
    config=Config,
    score=score,
    phase="prefill",
    rotates=True,
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Leverage scores (of Compactor)",
        paper="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        year=2025,
        idea="keys that stand out from the space of all others stay, without a look at any query",
        cost="one product of D x n by n x D and one triangular system of D rows for each head, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        lineage=("keydiff",),
        neutral={"budget": 1.0},
        caveat="exact: the paper and released code sketch the D channels down to 48 at random first, so theirs is this "
        "score with noise. Scores that agree in four digits are equal, and the earlier token stays. The authors' "
        "engine scores chunks of 512 tokens by themselves. ε is that of kvpress. The newest token stays in any case; "
        "in later turns, keys count that are still stored. Where a model's rotation cannot be undone, keys are taken "
        "as they are",
    ),
)
