"""SimLayerKV: layers whose last queries look at sinks and recent tokens alone keep those; the others keep all.

    a layer is lazy if   Σ_h Σ_{t > n-m} Σ_{j in S ∪ R} a_htj  >  δ · Σ_h Σ_{t > n-m} Σ_j a_htj
    S the first s tokens, R the last w          a lazy layer keeps S ∪ R, any other all that it holds

where a are the attention weights of the prompt's last m queries and n is its length. Some layers look so in whatever
step of one text, so the end of the prompt tells which. A budget is one for each layer: what lazy layers leave of
theirs goes to the layers above them, and a layer that is not lazy and has not enough keeps sinks and recent tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, slots_of


@dataclass(frozen=True)
class Config:
    # mean tokens by layer; None: the paper's rule, lazy layers sinks + window and the others all
    budget: Budget | int | float | str | None = None
    sinks: int = 4  # s
    window: int = 1024  # w, recent tokens of a lazy layer
    last: int = 32  # m, queries that are asked
    threshold: float = 0.9  # δ; the paper: 0.9 for Llama 3, 0.8 for Mistral, 0.65 for Llama 2

    def __post_init__(self) -> None:
        require(self.sinks >= 0 and self.window >= 1, "sinks >= 0, window >= 1", sinks=self.sinks)
        require(self.last >= 1, "last >= 1", last=self.last)
        require(0 <= self.threshold <= 1, "0 <= threshold <= 1", threshold=self.threshold)


def lazy(view: View, cfg: Config) -> Tensor:
    """[B] rows whose last queries give sinks and recent tokens more than the threshold of their attention."""
    received = view.received(newest=cfg.last)
    near = (view.rank() < cfg.sinks) | (view.age() < cfg.window)
    return (received * near).sum((1, 2)) > cfg.threshold * received.sum((1, 2))


def room(view: View, cfg: Config) -> Tensor:
    """[B] tokens that this layer may keep; what it leaves of its budget is handed on to the layers above."""
    held = view.hold().sum(-1).amax(-1).expand(len(view.budget))
    available = view.budget + view.shared.get("left", 0)
    few = available.clamp(max=cfg.sinks + cfg.window)
    tokens = torch.where(lazy(view, cfg), few, available)
    if cfg.budget is not None:  # one that covers the text lets all stay
        tokens = torch.where(view.budget >= held, held, tokens)
    view.shared["left"] = available - tokens.minimum(held)
    return tokens


def keep(view: View, cfg: Config) -> Kept | None:
    hold, tokens = view.hold(), room(view, cfg)[:, None, None]
    if not bool((hold.sum(-1, keepdim=True) > tokens).any()):
        return None
    # a sink that is gone leaves its room to the recent tokens
    sinks = (hold & (view.rank() < cfg.sinks)).sum(-1, keepdim=True).minimum(tokens - 1)
    first = torch.where(hold, view.rank(), view.seen).amin(-1, keepdim=True)
    return Kept(slots_of(hold & ((view.rank() - first < sinks) | (view.age() < tokens - sinks))))


METHOD = CachePage(
    config=Config,
    keep=keep,
    phase="prefill",
    budget=lambda cfg: 1.0,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "sinks": 1, "window": 4, "last": 3, "threshold": 0.4},),
    card=Card(
        title="SimLayerKV",
        paper="SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction",
        year=2024,
        idea="lazy layers, which attend to sinks and recent tokens, keep nothing else; the others keep all",
        cost="weights of m queries per layer, after the prompt",
        state="sinks + window tokens of the prompt in lazy layers, all of it in the others",
        needs=("decoder-lm",),
        lineage=("streaming_llm",),
        neutral={"threshold": 1.0},
        caveat="the paper's variant that decides at the prompt's end. Released code has the other switched on, which "
        "asks with the first generated token alone, and takes the mean over heads. kvpress asks with one query, whose "
        "weight on itself it leaves out, cuts only texts longer than sinks, window and queries together, and keeps one "
        "recent token less. The paper sets no "
        "budget",
    ),
)
