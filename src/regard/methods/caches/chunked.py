"""Chunks: each chunk of the text keeps its share of the budget, by the score of the method below.

    s'_j = - (p_j + 1/2) / ℓ_j          p_j tokens of the chunk come before j by score, of ℓ_j that it has in the text
    keep what stays in any case, then the budget's best s', by head

where a score over the whole text may choose all from one place, and here every part of it stays present in proportion.
The tokens with the smallest (p + ½) / ℓ are those of the shares that are nearest to b · ℓ / n in whole numbers
(Webster's method), so that none of a budget b is lost by rounding. Tokens that stay in any case count in their chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Unsupported, require
from regard.kinds.cache import CachePage, stays
from regard.ops import View, at_least_float32


@dataclass(frozen=True)
class Config:
    length: int = 1024  # tokens of a chunk; the last of a text may be shorter

    def __post_init__(self) -> None:
        require(self.length >= 1, "length >= 1", length=self.length)


def places(score: Tensor, chunk: Tensor, rank: Tensor) -> Tensor:
    """[B, G, n] how many tokens of its chunk come before each: those of higher score, of equals the earlier.

    >>> places(torch.tensor([5.0, 7.0, 5.0, 9.0]), torch.tensor([0, 0, 0, 1]), torch.arange(4))
    tensor([1, 0, 2, 0])
    """
    order = rank.expand(score.shape).argsort(dim=-1)
    for key, falling in ((score, True), (chunk.expand(score.shape), False)):  # the last key sorts first
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=falling, stable=True))
    chunk = chunk.expand(score.shape).gather(-1, order)
    at = torch.arange(score.shape[-1], device=score.device).expand_as(chunk)
    starts = torch.ones_like(chunk, dtype=torch.bool)
    starts[..., 1:] = chunk[..., 1:] != chunk[..., :-1]
    first = torch.where(starts, at, 0).cummax(-1).values
    return torch.zeros_like(order).scatter(-1, order, at - first)


def within_chunks(page: CachePage, cfg: Config) -> Callable[[View, Any], Tensor]:
    """[B, G, n]: where each stored token stands in its chunk."""

    def score(view: View, below: Any) -> Tensor:
        shape, held = (len(view.q), view.groups, view.stored), view.hold()
        s = at_least_float32(page.score(view, below)).expand(shape)  # type: ignore[misc]
        s = torch.where(stays(page, view, below), torch.finfo(s.dtype).max, s)
        chunk = view.rank() // cfg.length
        length = (view.length()[:, None, None] - chunk * cfg.length).clamp(1, cfg.length)
        place = places(s, chunk.masked_fill(~held, view.seen), view.rank())
        return -(place + 0.5).double() / length

    return score


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.score is None or page.keep is not None:
        raise Unsupported(f"chunked shares a budget by scores, and {page.card.title} has none")
    return replace(page, score=within_chunks(page, cfg))


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="Chunks",
        paper="ChunkPress of NVIDIA/kvpress, after FINCH: Prompt-guided Key-Value Cache Compression (TACL 2024)",
        year=2024,
        idea="every chunk of the text keeps its part of the budget, by the score of the method below",
        cost="that of the method below, and a sort of its scores",
        state="that of the method below",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"length": 1 << 30},
        caveat="kvpress scores each chunk by itself, with its own queries; here the whole text is scored once. It "
        "rounds each share down, to one token at least, so it may keep a token more or less for each chunk",
    ),
)
