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
from regard.ops import Budget, View, by_row, slots_of, top_slots


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # K; None: k
    k: int = 4096  # K, keys per KV head that steps between full ones read, beside the tokens since
    stride: int = 50  # S: one step in so many is full; 1: all are
    similarity: float | None = None  # dynamic variant: a step is full when the cosine falls below

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride >= 1", stride=self.stride)
        require(self.k >= 1, "k >= 1", k=self.k)


def due(view: View, cfg: Config) -> Tensor:
    """[B] rows whose step attends to everything: so many steps after the last, or a query unlike that one's."""
    memory = view.memory
    if "tokens" not in memory:
        return torch.ones(len(view.q), dtype=torch.bool, device=view.q.device)
    full = memory["steps"] >= cfg.stride
    if cfg.similarity is None:
        return full
    near = F.cosine_similarity(view.q[:, :, -1].float(), memory["query"].float(), dim=-1).mean(-1)
    return full | (near < cfg.similarity)


def select(view: View, cfg: Config) -> Tensor | None:
    memory, held = view.memory, view.hold()
    fits = view.budget >= held.sum(-1).amax(-1)  # [B]
    if view.phase != "decode" or bool(fits.all()):
        memory.pop("tokens", None)
        return None
    full = due(view, cfg) | fits
    if bool(full.any()):
        choose(view, full)
    memory["steps"] = torch.where(fits, cfg.stride, memory["steps"] + 1)
    if bool(full.all()):
        return None
    since = (view.index >= memory["seen"][:, None, None]) | full[:, None, None]
    chosen = view.slots(memory["tokens"]).masked_fill(full[:, None, None], -1)
    return torch.cat([chosen, slots_of(since & held).expand(*chosen.shape[:2], -1)], -1)


def choose(view: View, full: Tensor) -> None:
    """Note for the rows whose step is full [B] which keys the steps after it read."""
    memory = view.memory
    received = view.by_cache_head(view.weights()[:, :, 0])  # [B, G, n]
    tokens = view.tokens(top_slots(received.masked_fill(~view.hold(), -torch.inf), view.budget[:, None]))
    new = dict(tokens=tokens, query=view.q[:, :, -1], seen=torch.full_like(view.budget, view.seen),
               steps=torch.zeros_like(view.budget))  # fmt: skip
    old = {name: memory.get(name, x) for name, x in new.items()}
    wide = max(old["tokens"].shape[-1], tokens.shape[-1])
    for notes in (old, new):
        notes["tokens"] = F.pad(notes["tokens"], (0, wide - notes["tokens"].shape[-1]), value=-1)
    memory.update({name: by_row(full, x, old[name]) for name, x in new.items()})


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
