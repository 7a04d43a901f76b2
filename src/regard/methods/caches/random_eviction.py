"""Random eviction: what stays is drawn by lot, the baseline that every choice has to beat.

    s_j = uniform(seed, layer, head, j)          keep the budget's best s, by head, after the prompt

where j is the place of a token in its text. A draw is a hash, so it is the same whatever else is in the batch, and a
token that stays under one budget stays under every larger one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.hashing import uniform


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    seed: int = 0  # another one is another draw

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed >= 0", seed=self.seed)


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: a draw for each token of each head."""
    head = torch.tensor(view.heads or range(view.groups), device=view.index.device)
    return uniform(cfg.seed, view.layer, head[:, None], view.rank()).expand(len(view.q), -1, -1)


METHOD = CachePage(
    config=Config,
    score=score,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Random eviction",
        paper="none: the baseline of NVIDIA's kvpress",
        year=2024,
        idea="tokens stay by lot, by layer and by head",
        cost="one hash for each stored token, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        neutral={"budget": 1.0},
        caveat="one draw is one sample, so average over seeds. The newest token stays in any case. Texts of one batch "
        "draw alike at the same places",
    ),
)
