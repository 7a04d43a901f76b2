"""SparQ Attention: the largest components of the query find the tokens to read, the mean value stands for the rest.

    q̂ = the r components of largest Σ_h |q_h|, over the query heads that share a KV head
    ŝ = softmax(q̂ K̂ᵀ / √(D · ‖q̂‖₁ / ‖q‖₁))
    S = the l newest tokens and the best by Σ_h ŝ_h, k in all      by KV head
    α = Σ_{j in S} ŝ_j
    o = α · softmax attention over S + (1 - α) · v̄                 v̄ the mean of all values

where few components of a query are large, so that few rows of the keys, stored by channel, give its scores nearly;
the temperature makes up for the components that are left out. What the scores give to unread tokens is given to
their mean value, which is kept up token by token.

>>> temper(torch.tensor([3.0, -1.0, 4.0, 0.0]), torch.tensor([True, False, True, False]))     # / √(7/8)
tensor([3.2071, -0.0000, 4.2762, 0.0000])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import (
    Budget,
    View,
    at_least_float32,
    best,
    gather_rows,
    masked_softmax,
    mix,
    per_query_head,
    scores,
    slots_of,
)
from regard.ops.labels import report_reading


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # tokens that a KV head reads, the paper's k; None: 128
    rank: int = 32  # components of the query
    local: float = 0.25  # share of the budget that the newest tokens take; one of them at least

    def __post_init__(self) -> None:
        require(self.rank >= 1 and 0 <= self.local <= 1, "rank >= 1, 0 <= local <= 1", cfg=self)


def temper(q: Tensor, chosen: Tensor) -> Tensor:
    """[..., D] the chosen components of q, divided by √(‖q̂‖₁ / ‖q‖₁), the others zero."""
    size = q.abs()
    share = (size * chosen).sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=1e-30)
    return q * chosen / share.clamp(min=1e-30).sqrt()


def mean_value(view: View) -> Tensor:
    """[B, K, 1, E] of all tokens of each row; a step adds its own to the sum of those before."""
    memory, new = view.memory, view.stored
    known = memory.get("seen") == view.seen - view.tokens_fed
    real = view.hold()[:, :1].expand(-1, -1, view.stored)
    if known:  # the newest stand last, after the padding of their step
        new = min(view.tokens_fed, view.stored)
        real = torch.arange(new, device=real.device) >= new - view.fresh()[:, None, None]
    v = at_least_float32(view.v[:, :, view.stored - new :])
    total = (v * real[..., -new:, None]).sum(2, keepdim=True)
    memory["values"] = (total + memory["values"] if known else total).detach()
    memory["seen"] = view.seen
    return memory["values"] / view.length().clamp(min=1)[:, None, None, None]


def approximate(view: View, cfg: Config) -> Tensor:
    """[B, H, n] logarithms of the weights that the largest components of the query give: far ones underflow."""
    q = at_least_float32(view.q)
    size = q.abs().unflatten(1, (view.k.shape[1], -1)).sum(2)  # [B, K, 1, D]
    chosen = per_query_head(best(size, min(cfg.rank, q.shape[-1])), q.shape[1])
    s = scores(temper(q, chosen), at_least_float32(view.k), view.scale, view.softcap, view.bias)
    seen = view.visible(slice(None))
    s = (s if seen is None else s.masked_fill(~seen, -torch.inf))[:, :, 0]
    total = s.logsumexp(-1, keepdim=True)
    if view.sinks is not None:
        total = torch.logaddexp(total, view.sinks.to(total)[:, None])
    return s - total.nan_to_num(neginf=0.0)


def choose(view: View, cfg: Config, weights: Tensor) -> Tensor:
    """[B, K, m] slots of the newest tokens and of the best by the weights of all heads that share them."""
    summed = weights.unflatten(1, (view.k.shape[1], -1)).logsumexp(2)
    local = (view.budget * cfg.local).round().clamp(min=1)
    real = view.hold()[:, :1]
    summed = summed.masked_fill(real & (view.age()[:, :1] < local[:, None, None]), torch.inf)
    # of equal weights the first, as tokens have that repeat where the components are not rotated
    return slots_of(best(summed.masked_fill(~real, -torch.inf), view.budget[:, None]))


def attention(view: View, cfg: Config) -> Tensor | None:
    """[B, H, 1, E], or None where the model attends as ever: to a prompt, and in layers that slide a window."""
    if view.window is not None:
        return None
    mean = mean_value(view)
    if view.phase != "decode" or view.fits():
        return None
    weights = approximate(view, cfg)
    slots, weights = choose(view, cfg, weights), weights.exp()
    by_head = per_query_head(slots, view.q.shape[1]).clamp(min=0)
    read = per_query_head(slots >= 0, view.q.shape[1])
    k, v = gather_rows(view.k, slots), gather_rows(view.v, slots)
    bias, seen = view.bias, view.visible(slice(None))
    if bias is not None:
        bias = bias[:, :, -1].expand_as(weights).gather(-1, by_head)[:, :, None]
    if seen is not None:
        read = read & seen[:, :, 0].expand_as(weights).gather(-1, by_head)
    s = scores(view.q, k, view.scale, view.softcap, bias)
    out = mix(masked_softmax(s, read[:, :, None], view.sinks), at_least_float32(v))
    # what the weights give to tokens that are not read; a sink's share is no token's
    left = weights.sum(-1, keepdim=True) - (weights.gather(-1, by_head) * read).sum(-1, keepdim=True)
    left = left.clamp(0, 1)[..., None]
    report_reading(view, slots, view.k)
    return ((1 - left) * out + left * per_query_head(mean, view.q.shape[1])).to(view.v.dtype)


METHOD = CachePage(
    config=Config,
    attention=attention,
    reference="regard.testing.cache.sparq:reference",
    budget=lambda cfg: 128,
    patterns=("causal_self",),
    # where few components are rotated, fewer may be none of them: then tokens that repeat differ by rounding alone
    test_settings=({"budget": 8, "rank": 7},),
    card=Card(
        title="SparQ Attention",
        paper="SparQ Attention: Bandwidth-Efficient LLM Inference (ICML 2024, arXiv:2312.04985)",
        year=2024,
        idea="a query's largest components rank all tokens, few are read, and the mean value stands for the others",
        cost="r of D rows of keys stored by channel, then k keys and values per KV head",
        state="the whole cache and one mean value per head; memory does not shrink",
        needs=("qkv", "decoder-lm"),
        lineage=("tidaldecode",),
        neutral={"budget": 1.0},
        caveat="keys are not stored a second time by channel, so that here a step multiplies with all of them. "
        "Released code reads one token more than its k, and where heads share keys it adds up their scores instead of "
        "their weights. Prompts, questions of several tokens and layers that slide a window stay as they are",
    ),
)
