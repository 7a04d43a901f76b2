"""StreamingLLM: keep the first tokens as attention sinks and a rolling window of the most recent.

    stored at step t:  {0, …, s-1} ∪ {t-w+1, …, t}          s sinks, w recent tokens, t itself included
    position of a key: its slot, 0 … s+w-1, not its position in the text

where a softmax must put its mass somewhere, and trained models put what they do not need on the first tokens;
dropping those takes mass away from nowhere else. Rotary attention sees only differences of positions, so giving
slots as positions is the same as moving the sinks behind the window by the tokens that are gone: only the s sink
keys are rotated, from their first rotation every time. Four sinks suffice (Xiao et al., figure 2 and table 2).

>>> rank = torch.arange(8)
>>> stays(rank, 7 - rank, sinks=2, window=3).tolist()
[True, True, False, False, False, True, True, True]
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, slots_of


@dataclass(frozen=True)
class Config:
    sinks: int = 4  # s, first tokens, which stay
    window: int = 512  # w, last tokens, the newest included; with a budget, what it leaves beside the sinks
    budget: Budget | int | float | str | None = None  # all tokens, sinks included; None: sinks + window
    positions: Literal["slot", "text"] = "slot"  # or "text": leave positions as they are in the text

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)
        require(self.window >= 1, "window >= 1 (the token itself)", window=self.window)
        require(self.positions in ("slot", "text"), 'positions is "slot" or "text"', positions=self.positions)


def stays(rank: Tensor, age: Tensor, sinks: int | Tensor, window: int | Tensor) -> Tensor:
    """Whether a token stays: the first `sinks` by place in the text, the last `window` by age."""
    return (rank < sinks) | (age < window)


def keep(view: View, cfg: Config) -> Kept | None:
    if not view.over():
        return None
    budget = view.budget[:, None, None] if view.real is not None else view.budget[:1, None, None]
    hold, rank = view.hold(), view.rank()
    # a sink that is gone, from a layer's own window or a budget that was smaller, leaves its room to the recent tokens
    there = (hold & (rank < cfg.sinks)).sum(-1, keepdim=True)
    sinks = there.minimum((budget - 1).clamp(max=cfg.sinks))
    first = torch.where(hold, rank, view.seen).amin(-1, keepdim=True)
    return Kept(slots_of(stays(rank - first, view.age(), sinks, budget - sinks) & hold))


def shift(view: View, slots: Tensor | None, cfg: Config) -> Tensor | None:
    """How far the sink keys move: from the first place after them to that of the next token that is still there.

    Sinks are known by their place in the text: the slots before them may hold padding, or a token that came later.
    """
    if cfg.positions == "text" or cfg.sinks == 0:
        return None
    hold, rank = torch.broadcast_tensors(view.hold(), view.rank())  # [1|B, 1|g, n]
    sink = hold & (rank < cfg.sinks)
    where = sink.flatten(0, 1).any(0).nonzero()
    if len(where) == 0:
        return None
    end = first_gap(rank, hold, sink, cfg.sinks)
    after, position = hold & (rank >= end[..., None]), view.position()
    next_held = torch.where(after, position, position.amax() + 1).amin(-1)
    gone = torch.where(after.any(-1), next_held - view.position_at(end), 0)
    moved = torch.where(sink & (rank < end[..., None]), gone[..., None], 0)[..., : int(where[-1]) + 1]
    return moved if bool((moved > 0).any()) else None


def first_gap(rank: Tensor, hold: Tensor, sink: Tensor, sinks: int) -> Tensor:
    """[1|B, 1|g] the place behind the sinks that follow each other, from the first token that is still there."""
    # 0 but where a sliding layer dropped sinks
    start = torch.where(hold, rank, rank.amax() + 1).amin(-1)
    there = torch.zeros(*rank.shape[:2], sinks + 1, dtype=torch.bool, device=rank.device)
    there = there.scatter(-1, torch.where(sink, rank, sinks), True)[..., :-1]
    before = torch.arange(sinks, device=rank.device) < start[..., None]
    return torch.maximum(start, (there | before).cumprod(-1).sum(-1))


METHOD = CachePage(
    config=Config,
    keep=keep,
    shift=shift,
    budget=lambda cfg: cfg.sinks + cfg.window,
    by_place=True,
    patterns=("causal_self",),
    card=Card(
        title="StreamingLLM",
        paper="Efficient Streaming Language Models with Attention Sinks (ICLR 2024)",
        year=2023,
        idea="four first tokens stay as sinks beside a rolling window; positions are those in the cache",
        cost="O(sinks + window) per step",
        state="sinks + window tokens per head",
        needs=("decoder-lm",),
        lineage=("window",),
        neutral={"window": 1 << 30},
        caveat="evicted tokens are gone: facts outside the window cannot be retrieved. The window moves every step. "
        "Released code stores keys before rotation; here rotated sinks are rotated on, the same by relative position",
    ),
)
