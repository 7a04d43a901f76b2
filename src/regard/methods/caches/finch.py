"""FINCH: what is asked chooses what is kept. The tokens of the question vote for those of the document before it.

    s_j = mean_{t in question} c_t softmax(q_t K)_j     c_t tokens that query t sees: 1 is an equal share of attention
    keep the question's w tokens and, by head, the budget's best s
    with chunks: first those that are best in their chunk of the document, to each chunk its part of b - w

where a long document is read for one question at its end. Queries that see more spread their attention thinner; the
factor c_t lets each of them weigh the same. Without pooling, unlike SnapKV, tokens are chosen one by one.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, best
from regard.ops.relative import relative_votes
from regard.ops.texts import as_stored, in_text


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    window: int = 32  # tokens of the question, the last of the prompt
    chunk: int | None = None  # tokens of the document that share a part of the budget; None: all of them

    def __post_init__(self) -> None:
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.chunk is None or self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: relative attention from the question; what its chunk has a part for above all others."""
    votes = relative_votes(view, newest=cfg.window)
    if cfg.chunk is None:
        return votes
    votes = votes.masked_fill((view.age() < cfg.window) | ~view.hold(), 0)
    first = in_their_chunk(in_text(view, votes, empty=-1.0), view, cfg.window, cfg.chunk)
    lifted = as_stored(view, first.to(votes.dtype)) * (1 + votes.amax(-1, keepdim=True))
    return votes + lifted


def in_their_chunk(votes: Tensor, view: View, window: int, chunk: int) -> Tensor:
    """[B, G, length] bool: tokens of the document among the best of their chunk, of votes by place; -1: gone."""
    document = (view.length() - window).clamp(min=1)  # [1|B]
    spare = (view.budget - window).clamp(min=0)  # [B]
    length = votes.shape[-1]
    place = (view.rank().new_ones(length).cumsum(-1) - 1).expand_as(votes)
    votes = votes.masked_fill((votes < 0) | (place >= document[:, None, None]), float("-inf"))
    parts = F.pad(votes, (0, -length % chunk), value=float("-inf")).unflatten(-1, (-1, chunk))
    size = (document[:, None] - place[:, 0, ::chunk]).clamp(0, chunk)  # [B, chunks] tokens in each
    part = spare[:, None] * size // document[:, None]
    return best(parts, part[:, None]).flatten(2)[..., :length]


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < view.budget.clamp(max=cfg.window)[:, None, None]


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="FINCH",
        paper="FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models (TACL 2024)",
        year=2024,
        idea="the question at the end of the prompt votes which tokens of the document before it stay",
        cost="one explicit block of as many rows as the question has tokens, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"budget": 1.0},
        caveat="the paper feeds the document in chunks, each with the question behind it, and lets go before the next; "
        "here the prompt is fed as it is, and `chunk` shares the budget alone. Where the question begins is a setting, "
        "not a delimiter. Kept keys stay at their positions in the text; the paper moves them together. The factor is "
        "that of kvpress, which counts one token less for each query",
    ),
)
