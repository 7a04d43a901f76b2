"""CriticalKV: half of the budget goes by score, the other half by score times what the value adds to the output.

    first   the α b best by s                      s the scores of the method below, as shares of attention
    then    the best by (s_j + ε) · |W_o v_j|_1    W_o the head's part of the output projection, up to the budget b

where evicting token j moves the output of its head by no more than its weight times the length of its projected value.
The bound asks for a set that already holds most of the attention, which the first half sees to. Of query heads that
share a key the lengths are averaged.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Unsupported, require
from regard.core.errors import present
from regard.kinds.cache import CachePage, stays
from regard.ops import View, at_least_float32
from regard.ops.kept import best_by_age


@dataclass(frozen=True)
class Config:
    first: float = 0.5  # α, share of the budget that goes by score alone
    epsilon: float = 1e-4  # added to scores, so that a token without attention is not without weight

    def __post_init__(self) -> None:
        require(0 <= self.first <= 1, "0 <= first <= 1", first=self.first)
        require(self.epsilon >= 0, "epsilon >= 0", epsilon=self.epsilon)


def projected(view: View) -> Tensor:
    """[B, G, n] the L1 length of every stored value behind the output projection, a head at a time."""
    output = at_least_float32(present(view.output, "a view with the output projection", layer=view.layer))
    v, heads = at_least_float32(view.v), len(output)
    lengths = [(v[:, h * view.groups // heads] @ output[h]).abs().sum(-1) for h in range(heads)]
    return view.by_cache_head(torch.stack(lengths, 1)) * view.groups / heads


def score(view: View, below: Any, page: CachePage, cfg: Config) -> Tensor:
    """[B, G, n]: the first half above all others, in the order of its scores."""
    scores = at_least_float32(present(page.score, "a page with scores")(view, below)).expand(
        -1, view.groups, -1
    )
    ordered = torch.where(stays(page, view, below), torch.finfo(scores.dtype).max, scores)
    ordered = ordered.masked_fill(~view.hold(), -torch.inf)
    count = (view.budget.double() * cfg.first + 1e-9).long()
    first = best_by_age(view, ordered, count[:, None])
    critical = (scores + cfg.epsilon) * projected(view)
    top = critical.masked_fill(~view.hold(), 0).amax(-1, keepdim=True).clamp(min=0)
    return torch.where(first, (top + 1) * (2 + ordered.argsort(-1).argsort(-1)), critical)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.score is None:
        raise Unsupported(f"criticalkv weighs scores, and {page.card.title} has none")
    if page.allocate is not None:
        raise Unsupported(
            f"criticalkv over {page.card.title} with budgets by head: it does not know them when it weighs scores, so "
            "what shares the budget lies over it: snapkv+criticalkv+adakv"
        )
    return replace(page, score=lambda view, below: score(view, below, page, cfg), reads_output=True)


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="CriticalKV",
        paper="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (arXiv:2502.03805)",
        year=2025,
        idea="half of the budget by attention, half by attention times the projected value that an eviction would lose",
        cost="the output projection of every stored value, after the prompt",
        state="what the method below holds",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"first": 1.0},
        caveat="the bound is one of attention: scores that are no shares of attention, as negative norms, turn the "
        "weighing around. The scores below are sums over observing queries and heads, not means, so epsilon weighs "
        "less than in the paper. With budgets by head the paper shares them first and halves each; here what shares "
        "them lies over this page and sees its scores",
    ),
)
