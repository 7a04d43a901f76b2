"""Ada-KV: the budget of a layer is shared by its heads as the scores ask, not in equal parts.

    T = the G · b best scores of all heads of the layer together     b tokens for each of G heads
    head g keeps its best |T ∩ g| tokens, at least floor · b of them

where heads spread their attention unequally: one that looks at few tokens lends its part to one that looks at many,
and the sum of what is lost over the layer's heads is the smallest that a budget of G · b allows. Scores of heads are
compared as they are, so they have to mean the same in each, as shares of attention do.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, allocating
from regard.ops import View, best


@dataclass(frozen=True)
class Config:
    floor: float = 0.2  # share of the equal part that every head keeps

    def __post_init__(self) -> None:
        require(0 <= self.floor <= 1, "0 <= floor <= 1", floor=self.floor)


def allocate(view: View, score: Tensor, cfg: Config) -> Tensor:
    """[B, G] tokens of each head, G times the budget in all."""
    part = view.budget[:, None].expand(score.shape[:2])
    sure = best(score, (part * cfg.floor).long())
    raised = score.masked_fill(sure, torch.finfo(score.dtype).max)
    return best(raised.flatten(1), part.sum(-1)).view(score.shape).sum(-1)


METHOD = CachePage(
    config=Config,
    wrap=lambda page, cfg: allocating("adakv", page, partial(allocate, cfg=cfg)),
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="Ada-KV",
        paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        year=2024,
        idea="heads of a layer compete for one budget, with a floor for each",
        cost="one more selection over all heads of a layer, after the prompt",
        state="as many tokens as the method below, in unequal parts by head",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"floor": 1.0},
        caveat="with several texts in a batch a head holds memory for the longest of its rows. Released "
        "code keeps the floor beside the window of SnapKV; here the window counts in it",
    ),
)
