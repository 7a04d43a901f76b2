"""ChunkKV: whole chunks of the text stay or go, by the mean score of their tokens, the same ones in every head.

    S_i = mean_{j in chunk i} Σ_g s_{g,j}          chunk i: tokens i c ... (i+1) c - 1 of the text
    keep the chunks with the largest S             what the method below keeps in any case stands beside them

where single tokens chosen by their scores are torn out of the phrases that give them meaning. Chunks that one layer
keeps are mostly those of the next, so `reuse` layers may share one choice.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Unsupported, require
from regard.core.errors import present
from regard.kinds.cache import CachePage, stays
from regard.ops import View, at_least_float32


@dataclass(frozen=True)
class Config:
    chunk: int = 10  # tokens of a chunk
    reuse: int = 1  # layers that share the chunks of the first of them

    def __post_init__(self) -> None:
        require(
            self.chunk >= 1 and self.reuse >= 1, "chunk >= 1, reuse >= 1", chunk=self.chunk, reuse=self.reuse
        )


def chunks_of(view: View, cfg: Config) -> Tensor:
    """[B, G, n] the chunk of every token."""
    return view.rank().clamp(min=0).expand(len(view.q), view.groups, -1) // cfg.chunk


def means(view: View, below: Any, page: CachePage, cfg: Config) -> Tensor:
    """[B, chunks] mean score of a chunk, over all heads of the layer and over its tokens that are stored and need a
    score to stay.
    """
    shape = (len(view.q), int(view.length().max() - 1) // cfg.chunk + 1)
    total, count = (view.q.new_zeros(shape, dtype=torch.float64) for _ in range(2))
    for other in view.beside or (view,):
        chunk = chunks_of(other, cfg).clamp(max=shape[1] - 1)
        score = at_least_float32(present(page.score, "a page with scores")(other, below))
        counted = (other.hold() & ~stays(page, other, below)).expand_as(chunk)
        score = score.expand(chunk.shape).masked_fill(~counted, 0)
        total.scatter_add_(1, chunk.flatten(1), score.double().flatten(1))
        count.scatter_add_(1, chunk.flatten(1), counted.double().flatten(1))
    # chunks whose tokens all have one pooled score have equal means, in whatever order they were added up
    return (total / count.clamp(min=1)).float()


def score(view: View, below: Any, page: CachePage, cfg: Config) -> Tensor:
    """[B, G, n]: every token has the score of its chunk."""
    chunk, name = chunks_of(view, cfg), f"chunkkv {view.layer // cfg.reuse}"
    if name not in view.shared:
        view.shared[name] = means(view, below, page, cfg)
    shared = view.shared[name]
    return shared.gather(1, chunk.clamp(max=shared.shape[1] - 1).flatten(1)).view(chunk.shape)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.score is None:
        raise Unsupported(f"chunkkv takes the mean of scores, and {page.card.title} has none")
    return replace(page, score=lambda view, below: score(view, below, page, cfg))


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="ChunkKV",
        paper="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference "
        "(arXiv:2502.00299)",
        year=2025,
        idea="chunks of the text stay or go as wholes, so that what is kept can be read",
        cost="nothing beyond the method below; with reuse, its scores in every so many layers alone",
        state="what the method below holds, the same tokens in all heads of a layer",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"chunk": 1},
        caveat="the budget is used to its last token: of the best chunk that no longer fits the first tokens stay. "
        "kvpress keeps a share of the chunks instead, has chunks of 20, and counts what stays anyhow in their means",
    ),
)
