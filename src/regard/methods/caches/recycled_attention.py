"""Recycled Attention: a full step finds the keys, the steps until the next full one read them again.

    every S-th step       full attention; I_g = top-K_j Σ_{h in g} softmax(q_h K)_j, by layer and KV head
    all other steps       attention over I_g and the tokens generated since

where consecutive steps attend to much the same tokens. The whole cache is kept: reads shrink, memory does not.
The dynamic variant makes a step full as soon as the query is less similar to that of the last full step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, top_slots


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # K; None: k
    k: int = 4096
    stride: int = 50  # S: one step in so many is full; 1: all are
    similarity: float | None = None  # dynamic variant: a step is full when the cosine falls below

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride >= 1", stride=self.stride)
        require(self.k >= 1, "k >= 1", k=self.k)


def is_full_step(view: View, cfg: Config) -> bool:
    """Whether this step attends to everything."""
    memory = view.memory
    if "tokens" not in memory or memory["steps"] >= cfg.stride:
        return True
    if cfg.similarity is None:
        return False
    similarity = F.cosine_similarity(view.q[:, :, -1].float(), memory["query"].float(), dim=-1).mean()
    return bool(similarity < cfg.similarity)


def select(view: View, cfg: Config) -> Tensor | None:
    memory = view.memory
    if view.phase != "decode" or view.fits():
        memory.pop("tokens", None)
        return None
    if is_full_step(view, cfg):
        received = view.by_cache_head(view.weights()[:, :, 0])  # [B, G, n]
        received = received.masked_fill(~view.hold(), -torch.inf)
        slots = top_slots(received, view.budget[:, None])
        memory.update(tokens=view.tokens(slots), steps=1, query=view.q[:, :, -1], seen=view.seen)
        return None
    memory["steps"] += 1
    slots, new = view.slots(memory["tokens"]), view.seen - memory["seen"]
    since = torch.arange(max(0, view.stored - new), view.stored, device=view.q.device)
    return torch.cat([slots, since.expand(*slots.shape[:2], -1)], -1)


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: cfg.k,
    patterns=("causal_self",),
    reads_generated=True,
    card=Card(
        title="Recycled Attention",
        paper="Recycled Attention: Efficient inference for long-context language models",
        year=2024,
        idea="full attention every S-th step chooses the keys that the steps in between recycle",
        cost="one full read in S steps, K plus the recent tokens in the others",
        state="the whole cache; memory does not shrink",
        needs=("decoder-lm",),
        neutral={"stride": 1},
        caveat="the first step after a prompt is full. Weights of grouped query heads are summed; the paper leaves "
        "the aggregation and the defaults of S and K open to the model, those here are for contexts of 32k and more",
    ),
)
