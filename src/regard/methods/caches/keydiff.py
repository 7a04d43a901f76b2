"""KeyDiff: keys that point where most keys point go; the most distinctive stay.

    μ = mean_j k_j / |k_j|₂        the anchor, over the keys that a head stores
    s_j = - cos(μ, k_j)            keep the budget's best s, by head, after every step

where k_j are stored keys. Tokens that receive much attention have keys unlike the others, so no query is asked and
no weight computed. The sum of s over what stays is, with the anchor held fixed, the least similarity to all keys.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from regard.core import Card
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: 2048 tokens, the smallest of the paper


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: the less a key points along the anchor of all stored keys, the better."""
    direction = F.normalize(at_least_float32(view.k), dim=-1)
    total = direction.masked_fill(~view.hold()[..., None], 0).sum(2)  # [B, G, D]
    alike = (direction @ F.normalize(total, dim=-1)[..., None]).squeeze(-1)
    return -view.by_cache_head(alike)


METHOD = CachePage(
    config=Config,
    score=score,
    budget=lambda cfg: 2048,
    patterns=("causal_self",),
    card=Card(
        title="KeyDiff",
        paper="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
        "Environments (NeurIPS 2025)",
        year=2025,
        idea="keys far from the mean direction of all keys stay, without a look at any query",
        cost="one mean direction and one cosine for each stored key, in every step",
        state="budget tokens per head",
        needs=("decoder-lm",),
        lineage=("knorm",),
        neutral={"budget": 1.0},
        caveat="the paper feeds a prompt in blocks of 128 and evicts after each, which a prompt that is fed in chunks "
        "gives here too; fed at once, it is cut once. The newest token stays in any case. kvpress evicts after the "
        "prompt alone",
    ),
)
