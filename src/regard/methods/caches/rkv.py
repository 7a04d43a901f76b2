"""R-KV: what stays is asked for by the last queries, and is not said again by a later key.

    I_j = pool_j mean_t softmax_j( max_h q_t · k_j / √D )       the last w queries t, heads h of one cache head
    R_j = softmax_j( mean_i S_ij )     S_ij = cos(k_i, k_j), but 0 for i = j and for the last j with S_ij > T
    s_j = λ I_j - (1 - λ) R_j          keep the last w tokens and, by head, the budget's best s

where the first softmax runs over the tokens before the last w, and pool takes the maximum of p neighbours of the text.
A long chain of thought repeats itself, and attention falls on each repetition. R is large for a key that many others
resemble; of tokens that are alike the last is spared, since for each i the newest similar key is not counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32, masked_softmax, row_blocks
from regard.ops.recent import recent_scores, remember


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # the window included; None: 1024 tokens
    window: int = 8  # w, observing queries
    pool: int = 7  # p, neighbours that share a vote; odd
    mix: float = 0.1  # λ, the part of importance
    similar: float = 0.5  # T, the cosine above which keys say the same

    def __post_init__(self) -> None:
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.pool >= 1 and self.pool % 2, "pool is odd", pool=self.pool)
        require(0 <= self.mix <= 1, "0 <= mix <= 1", mix=self.mix)
        require(-1 <= self.similar <= 1, "-1 <= similar <= 1", similar=self.similar)


def observe(view: View, cfg: Config) -> None:
    remember(view, cfg.window)


def importance(view: View, cfg: Config) -> Tensor:
    """[B, G, n] I: attention of the window's queries to what lies before it."""
    s, asks = recent_scores(view)
    s = s.unflatten(1, (view.groups, -1)).amax(2)  # [B, G, w, n]
    votes = masked_softmax(s, (view.age() >= cfg.window)[:, :, None]).sum(2)
    votes = votes / asks.sum(-1).clamp(min=1)[:, None, None]
    # neighbours are those of the text, not of the cache
    length = int(view.length().max())
    place = view.rank().masked_fill(~view.hold(), length).expand_as(votes)
    text = votes.new_zeros(*votes.shape[:2], length + 1).scatter(-1, place, votes)[..., :-1]
    pooled = F.max_pool1d(text, cfg.pool, stride=1, padding=cfg.pool // 2)
    return pooled.gather(-1, place.clamp(max=length - 1)).masked_fill(view.age() < cfg.window, 0)


def redundancy(view: View, cfg: Config) -> Tensor:
    """[B, G, n] R: how much the stored keys resemble this one, each but for the last that is similar to it."""
    held, k = view.hold(), at_least_float32(view.k)
    k = k / (k.norm(dim=-1, keepdim=True) + 1e-8) * held[..., None]
    rank, total = view.rank()[:, :, None], torch.zeros_like(k[..., 0])
    for rows in row_blocks(view.stored, k.shape[0] * k.shape[1] * view.stored):
        s = k[:, :, rows] @ k.mT  # [B, G, rows, n]
        s.diagonal(rows.start, dim1=-2, dim2=-1).zero_()
        newest, last = torch.where(s > cfg.similar, rank, -1).max(-1, keepdim=True)
        s.scatter_(-1, last, s.gather(-1, last).masked_fill(newest >= 0, 0))
        total += s.sum(2)
    mean = total / held.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~held, -torch.inf).softmax(-1)


def score(view: View, cfg: Config) -> Tensor:
    return cfg.mix * importance(view, cfg) - (1 - cfg.mix) * redundancy(view, cfg)


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < view.budget.clamp(max=cfg.window)[:, None, None]


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    always=always,
    budget=lambda cfg: 1024,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "window": 3, "pool": 3},),
    card=Card(
        title="R-KV",
        paper="R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
        year=2025,
        idea="attention of the last queries less the similarity of keys: of what is said twice the last stays",
        cost="cosines of all stored keys with each other, whenever something goes",
        state="budget tokens and w queries per head",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"budget": 1.0},
        caveat="the paper fills a buffer of 128 generated tokens before it cuts; here a step over the budget cuts, and "
        "rkv+every cuts once in so many. Of the similar keys one is spared (the paper's β is 1, as in released code). "
        "Released code pools over neighbours in the cache, has λ = 0.07 by default, and where no key is similar "
        "leaves the first stored token out of the mean; here it leaves none out",
    ),
)
