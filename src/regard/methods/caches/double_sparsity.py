"""Double Sparsity: a few channels of the keys, chosen once, find the tokens that a query reads.

    C_h = top-r_c  mean_i |q_ic k_ic|          channels of query head h, over the tokens of the prompt
    ŝ_j = Σ_{c in C_h} q_c k_jc                from the label cache, which holds these channels alone
    read the top-k_j of ŝ, by query head, and attend to them with whole keys

where few channels carry most of a score, and which ones hardly changes from token to token: chosen once, their keys
lie side by side. The paper reads 1/16 of the channels and 1/16 of the tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32, best, per_query_head, row_blocks, scores, slots_of
from regard.ops.labels import labels, learned, report_reading


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # tokens that a query head reads; None: 1/16 of the text
    channels: float = 1 / 16  # share of the channels that scores are computed from
    full: int = 2  # layers that are read whole

    def __post_init__(self) -> None:
        require(0 < self.channels <= 1, "0 < channels <= 1", channels=self.channels)
        require(self.full >= 0, "full >= 0", full=self.full)


def strength(view: View) -> Tensor:
    """[B, H, D] Σ_i |q_ic k_ic| over the tokens of this step, each query with the key of its own token."""
    rows = min(view.new, view.stored)
    q, k, asks = view.q[:, :, -rows:], view.k[:, :, -rows:], view.asking()
    total = at_least_float32(q.new_zeros(len(q), q.shape[1], q.shape[3]))
    for cut in row_blocks(rows, len(q) * q.shape[1] * q.shape[3]):
        each = (at_least_float32(q[:, :, cut]) * per_query_head(k[:, :, cut], q.shape[1])).abs()
        total = total + (each if asks is None else each * asks[:, None, -rows:, None][:, :, cut]).sum(2)
    return total


def strongest(view: View, count: int) -> Tensor:
    """[B, H, r] channels by their strength; of equals the first."""
    return strength(view).argsort(dim=-1, descending=True, stable=True)[..., :count]


def at_channels(x: Tensor, channels: Tensor) -> Tensor:
    """[B, H, m, r] these channels [B, H, r] of queries [B, H, m, D] or keys [B, K, m, D]."""
    x = per_query_head(x, channels.shape[1])
    return at_least_float32(x.gather(-1, channels[:, :, None].expand(-1, -1, x.shape[2], -1)))


def select(view: View, cfg: Config) -> Tensor | None:
    if view.layer < cfg.full:
        return None
    r = math.ceil(round(cfg.channels * view.k.shape[-1], 9))
    channels = learned(view, "channels", lambda: strongest(view, r)).expand(len(view.q), -1, -1)
    label = labels(view, lambda k: at_channels(k, channels))  # [B, H, n, r]
    if view.phase != "decode" or view.fits():
        return None
    s = scores(at_channels(view.q, channels), label, view.scale, view.softcap, view.bias)
    seen = view.visible(slice(None))
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    # of equal scores the first, as tokens have that repeat where nothing is rotated
    slots = slots_of(best(s[:, :, 0], view.budget[:, None]))
    report_reading(view, slots, label)
    return slots


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: 1 / 16,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "channels": 0.25, "full": 1},),
    card=Card(
        title="Double Sparsity",
        paper="Post-Training Sparse Attention with Double Sparsity (arXiv:2408.07092)",
        year=2024,
        idea="channels that matter are chosen once, and rank the tokens of which whole keys and values are read",
        cost="N labels of r numbers per query head, then the budget's keys and values",
        state="the whole cache and r numbers per key and query head; memory does not shrink",
        needs=("decoder-lm",),
        lineage=("tidaldecode",),
        neutral={"budget": 1.0},
        caveat="the paper calibrates channels offline on another corpus, and its label cache may have 4 bits; here "
        "they come from each text's own prompt, after rotation (of a prompt fed in chunks: its first), at full "
        "precision. Prompts and questions of several tokens attend to everything; the released evaluation chooses for "
        "each of their tokens too. The two full layers are those of the released code",
    ),
)
