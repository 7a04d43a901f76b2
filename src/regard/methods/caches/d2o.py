"""D2O: what is evicted by accumulated attention is merged into the kept token whose key is most like its own.

    A_j = Σ_{t >= j} softmax(q_t K)_j           attention received, summed over the steps while j was stored
    keep the first tokens, the recent part of the budget and, by head, those with the largest A

    u_i = max_{c kept} cos(k_i, k_c)            of every evicted token i, which belongs to that c
    τ   = β mean_i(u_i) + (1 - β) τ             after each eviction; after the first the mean alone
    k_c = (e k_c + Σ_i exp(u_i) k_i) / (e + Σ_i exp(u_i))      over the i of c with u_i >= τ; values alike

where what is evicted may be asked for later after all. A token that resembles a kept one more than evicted tokens
mostly do is recalled in it; the others are gone. e = exp(1) is the weight of the kept token, whose key is its own.
"""

from dataclasses import dataclass
from math import e

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, at_least_float32, gather_rows, keep_best, row_blocks, slots_of
from regard.ops.rewriting import standing, staying


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # first, recent and other tokens together; None: 0.2
    recent: float = 0.5  # share of the budget for the most recent tokens
    sinks: int = 4  # first tokens, which stay
    smoothing: float = 0.5  # β, weight of the latest eviction in the threshold

    def __post_init__(self) -> None:
        require(0 <= self.recent < 1, "0 <= recent < 1", recent=self.recent)
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)
        require(0 <= self.smoothing <= 1, "0 <= smoothing <= 1", smoothing=self.smoothing)


def observe(view: View, cfg: Config) -> None:
    view.notes("received").add_(view.received())


def always(view: View, cfg: Config) -> Tensor:
    """The recent tokens, and as many of the first ones as they leave room for."""
    recent = (view.budget.double() * cfg.recent - 1e-9).ceil().clamp(min=1)
    first = (view.budget - recent).clamp(max=cfg.sinks)
    return (view.age() < recent[:, None, None]) | (view.rank() < first[:, None, None])


def keep(view: View, cfg: Config) -> Kept | None:
    kept = keep_best(view, view.notes("received"), always(view, cfg))
    if kept is None:
        return None
    stays = staying(view, kept)
    gone = slots_of(view.hold() & ~stays)  # [B, G, e]
    like, target = nearest(view, kept, gone)
    chosen = (gone >= 0) & (like >= threshold(view, like, gone >= 0, cfg)[..., None])
    if not bool(chosen.any()):
        return kept
    weight = torch.where(chosen, like.exp(), 0)
    k, v = standing(view, kept)
    return Kept(
        kept.slots,
        rewritten=(merged(k, view.k, gone, target, weight), merged(v, view.v, gone, target, weight)),
    )


def nearest(view: View, kept: Kept, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Of every evicted token the largest cosine with a kept key, and which of the kept it is: both [B, G, e]."""
    here = F.normalize(standing(view, kept)[0], dim=-1)
    there = F.normalize(at_least_float32(gather_rows(view.k, gone)), dim=-1)
    absent = (kept.slots < 0)[:, :, None]  # [1|B, 1|G, 1, m]
    found = [
        (there[:, :, rows] @ here.mT).masked_fill(absent, -torch.inf).max(-1)
        for rows in row_blocks(gone.shape[-1], here.shape[:3].numel())
    ]
    return torch.cat([x.values for x in found], -1), torch.cat([x.indices for x in found], -1)


def threshold(view: View, like: Tensor, there: Tensor, cfg: Config) -> Tensor:
    """[B, G] τ after this eviction, which is remembered; NaN: nothing was evicted yet."""
    count = there.sum(-1)
    mean = like.masked_fill(~there, 0).sum(-1) / count
    old = view.memory.get("threshold", torch.full_like(mean, torch.nan))
    new = torch.where(old.isnan(), mean, cfg.smoothing * mean + (1 - cfg.smoothing) * old)
    view.memory["threshold"] = torch.where(count > 0, new, old)
    return view.memory["threshold"]


def merged(x: Tensor, stored: Tensor, gone: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """x [B, G, m, D] of the kept tokens, with what is merged into each: exactly as it was where nothing is."""
    weight = weight[..., None]
    parts = (at_least_float32(gather_rows(stored, gone)) * weight).masked_fill(weight == 0, 0)
    total = torch.zeros_like(x).scatter_add(2, target[..., None].expand_as(parts), parts)
    sums = x.new_zeros(x.shape[:3]).scatter_add(2, target, weight[..., 0])[..., None]
    return x + (total - sums * x) / (sums + e)


METHOD = CachePage(
    config=Config,
    observe=observe,
    keep=keep,
    rewrites=True,
    budget=lambda cfg: 0.2,
    patterns=("causal_self",),
    card=Card(
        title="D2O: Dynamic Discriminative Operations",
        paper="D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models "
        "(arXiv:2406.13035, ICLR 2025)",
        year=2024,
        idea="evicted tokens that resemble a kept one are merged into it, by a threshold that follows the text",
        cost="explicit weights of every step, and the cosines of evicted with kept keys",
        state="budget tokens per head, one number each, and a threshold",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="budgets by layer, which the paper takes from the variance of attention, are not here: all layers have "
        "one. Shares and β are defaults of the released code. It leaves the first two layers and the last whole, "
        "evicts from the first generated token on, has one threshold for all heads, and weighs what it merges with the "
        "cosine itself in a plain mean. Keys are compared and merged as rotated to their positions, as there",
    ),
)
