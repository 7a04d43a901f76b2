"""Q-Filters: one direction by head says which keys queries like, and keys are ranked by their part along it.

    Q = U S Vᵀ              the prompt's queries of head h, [N, D], as they stand, rotated
    f_h = ± V_1             first right singular vector, turned so that the mean query lies on its side
    s_j = k_j · f           f the mean of f_h over the query heads that share the key
    keep the budget's best s, by head, after the prompt

where queries and keys lie far from the origin, along one direction of each head: the mean of q·k over queries is, up to
a factor, the part of k along it. No weight is computed, and the direction hardly depends on the text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text


def directions(view: View) -> Tensor:
    """[B, G, D] the mean filter of the query heads that share a key, of this turn's queries."""
    q, asking = at_least_float32(view.q), view.asking()
    if asking is not None:
        q = q.masked_fill(~asking[:, None, :, None], 0)
    first = torch.linalg.eigh(q.mT @ q).eigenvectors[..., -1]  # of QᵀQ [B, H, D, D]: V_1 [B, H, D]
    other_side = (first * q.sum(2)).sum(-1, keepdim=True) < 0
    return view.by_cache_head(torch.where(other_side, -first, first)) * view.groups / first.shape[1]


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: the further along the direction of the queries, the better."""
    return (at_least_float32(view.k) @ directions(view)[..., None])[..., 0]


METHOD = CachePage(
    config=Config,
    score=score,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Q-Filters",
        paper="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression (arXiv:2503.02812)",
        year=2025,
        idea="a key is worth what it measures along the main direction of its head's queries",
        cost="one D x D product and eigenvector per query head, and one product with each stored key; no weights",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("qkv", "decoder-lm"),
        lineage=("knorm",),
        neutral={"budget": 1.0},
        caveat="the paper measures filters once per model on a sample of other texts, and kvpress loads those from a "
        "hub; here each prompt is its own sample, and a later one, short as it may be, has a filter of its own. The "
        "newest token stays in any case; what is generated all stays, and the paper compresses it too",
    ),
)
