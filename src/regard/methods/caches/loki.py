"""Loki: keys are searched by their first few principal components.

    P_h = eigenvectors of the covariance of the prompt's keys, by layer and KV head, the largest variance first
    ŝ_j = (q P_d) · (k_j P_d)          the first d columns alone
    read the top-k_j of ŝ, by query head, and attend to them with whole keys

where the keys of a head lie near a space of far fewer dimensions than they have, before and after rotation: a
quarter of the components finds nearly the tokens that all of them would. With all of them P is a rotation, the
scores are exact, and what is read is the true top-k.

>>> k = torch.tensor([[3.0, 3.0], [1.0, 1.0], [2.0, 2.1]])      # along the diagonal
>>> principal(torch.cov(k.T, correction=0), 1).abs().round(decimals=1)
tensor([[0.7000],
        [0.7000]])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32, best, per_query_head, scores, slots_of
from regard.ops.labels import labels, learned, report_reading

PIECE = 4096  # keys that are widened to float64 at a time: bounds the memory, never changes the result
FLAT = 1e-10  # of all variance: a direction with less has none, and any other would do as well


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = (
        None  # tokens that a query head reads; None: a quarter of the text
    )
    components: float = 0.25  # share of the components that scores are computed from

    def __post_init__(self) -> None:
        require(0 < self.components <= 1, "0 < components <= 1", components=self.components)


def principal(covariance: Tensor, count: int) -> Tensor:
    """[..., D, count] directions of the largest variance, of a covariance [..., D, D]; zero where there is none."""
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    flat = values <= FLAT * values.clamp(min=0).sum(-1, keepdim=True)
    return vectors.masked_fill(flat[..., None, :], 0).flip(-1)[..., :count]


def covariance(view: View) -> Tensor:
    """[B, K, D, D] float64, of all stored keys that are real tokens."""
    real, total, product = view.hold()[:, :1, :, None], 0, 0
    for at in range(0, view.stored, PIECE):
        k = view.k[:, :, at : at + PIECE].double() * real[:, :, at : at + PIECE]
        total, product = total + k.sum(2), product + k.mT @ k
    count = real.sum(2).clamp(min=1)
    mean = total / count
    return product / count[..., None] - mean[..., None] * mean[..., None, :]


def select(view: View, cfg: Config) -> Tensor | None:
    dtype = at_least_float32(view.k).dtype
    d = math.ceil(round(cfg.components * view.k.shape[-1], 9))
    basis = learned(view, "basis", lambda: principal(covariance(view), d).to(dtype))  # [B, K, D, d]
    low = labels(view, lambda k: at_least_float32(k) @ basis)  # [B, K, n, d]
    if view.phase != "decode" or view.fits():
        return None
    q = at_least_float32(view.q) @ per_query_head(basis, view.q.shape[1])
    s, seen = scores(q, low, view.scale, view.softcap, view.bias), view.visible(slice(None))
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    # of equal scores the first, as tokens have that repeat where nothing is rotated
    slots = slots_of(best(s[:, :, 0], view.budget[:, None]))
    report_reading(view, slots, low)
    return slots


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: 0.25,
    patterns=("causal_self",),
    card=Card(
        title="Loki",
        paper="Loki: Low-Rank Keys for Efficient Sparse Attention (NeurIPS 2024, arXiv:2406.02542)",
        year=2024,
        idea="tokens are ranked by a few principal components of their keys, and read whole where they rank high",
        cost="N projected keys of d numbers, then the budget's keys and values per query head",
        state="the whole cache, d numbers more per key, and D·d per head; memory does not shrink",
        needs=("decoder-lm",),
        lineage=("tidaldecode",),
        neutral={"budget": 1.0},
        caveat="the paper computes the components once from another corpus, before or after rotation, and stores keys "
        "in their basis; here they come from each text's own prompt, after rotation (of a prompt fed in chunks: its "
        "first), and the projected keys lie beside the cache. Prompts and questions of several tokens attend to "
        "everything; the released evaluation chooses for each of their tokens too",
    ),
)
