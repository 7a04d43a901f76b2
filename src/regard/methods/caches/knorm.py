"""Knorm: keys of small norm draw attention, so the tokens with the largest key norms go.

    s_j = - |k_j|_2          keep the budget's best s, by head, after the prompt

where in decoder-only models a token whose key has a small norm mostly receives much attention: no query is asked, no
weight computed.
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32
from regard.ops.leverage import rounded


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: the shorter the key, the better. In four digits: where a model normalises its keys, all are alike."""
    return view.by_cache_head(-rounded(at_least_float32(view.k).norm(dim=-1)))


METHOD = CachePage(
    config=Config,
    score=score,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Knorm",
        paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        year=2024,
        idea="a small key norm means much attention, so norms alone choose what stays",
        cost="one norm for each stored key, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        neutral={"budget": 1.0},
        caveat="the newest token stays in any case. Norms that agree in four digits are equal, and the earlier token "
        "stays; kvpress lets the last bit of float32 choose. The paper leaves the first two layers whole; here all "
        "layers have one budget unless an allocator says otherwise",
    ),
)
