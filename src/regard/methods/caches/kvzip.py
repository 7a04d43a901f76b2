"""KVzip: the model is asked to repeat the prompt, and what it looks at while it does is what a prompt is worth.

    after the prompt:  "Repeat the previous context exactly." and the prompt's own tokens, a chunk in a pass
    s_j = max_{g, t} softmax( q_t [K_sinks | K_chunk | K_pass] )_j     for the tokens j of the chunk, over the queries t
                                                                       of the pass and the heads g of a group
    the budgets of all heads of all layers are one, and the best s of all together stay

where a cache from which the prompt can be written down again serves any question that may come, while the last queries
of a prompt (SnapKV) know the one that they ask. A second reading costs what the prompt did, and more.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, best, row_blocks
from regard.ops.observed import by_query_head
from regard.ops.rereading import WORTH, Rereading, Words


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = (
        None  # None: 30 % of the tokens, the mean over heads and layers
    )
    sinks: int = 4  # first tokens, which stay, and count in the softmax of every chunk
    chunk: int = 2000  # tokens of the prompt that are repeated in one pass
    lead: int = 8  # tokens before a later chunk that its instruction quotes
    # what the model is asked before the first chunk, as a text or as token ids
    whole: Words = "\n\nRepeat the previous context exactly."
    # the same before a later chunk, with the quoted tokens behind it
    part: Words = "\n\nRepeat the part of the previous context exactly, starting with "
    answer: Words = "\n"  # the same for what opens an answer in the model's chat template

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)
        Rereading(self.whole, self.part, self.answer, self.chunk, self.lead)


def worth(view: View, chunk: Tensor, cfg: Config) -> Tensor:
    """[B, G, n] the most attention that a query of the pass gives to each token of the chunk; 0 to others."""
    old = view.index < view.seen - view.tokens_fed
    counts = chunk | (view.hold() & (~old | (view.rank() < cfg.sinks)))
    at = counts.flatten(0, 1).any(0).nonzero()[:, 0]  # columns that any row or head reads
    counts = by_query_head(view, counts[..., at])

    def visible(rows: slice) -> Tensor:
        seen = view.visible(rows)
        return counts if seen is None else counts & seen[..., at]

    bias = view.bias if view.bias is None else view.bias[..., at]
    cut = replace(view, k=view.k[:, :, at], bias=bias, visible=visible, cached_scores=None)
    asking, most = view.asking(), view.k.new_zeros(*view.q.shape[:2], len(at), dtype=torch.float32)
    for rows in row_blocks(view.new, view.q.shape[0] * view.q.shape[1] * len(at)):
        # the pass stands last, and no query of it sees what follows
        last = int((at < view.stored - view.new + rows.stop).sum())
        weights = cut.upto(last).weights(rows)
        if asking is not None:
            weights = weights * asking[:, None, rows, None]
        most[..., :last] = torch.maximum(weights.amax(2), most[..., :last])
    found = most.unflatten(1, (view.groups, -1)).amax(2)
    return found.new_zeros(*found.shape[:2], view.stored).index_copy(-1, at, found) * chunk


def always(view: View, cfg: Config) -> Tensor:
    """Sinks and the newest token; of a layer that slides a window, which is not repeated, the newest."""
    if view.window is not None:
        return view.age() < view.budget[:, None, None]
    sinks = view.budget.clamp(max=cfg.sinks + 1) - 1
    return (view.rank() < sinks[:, None, None]) | (view.age() < 1)


def allocate(view: View, score: Tensor, cfg: Config) -> Tensor:
    """[B, heads] tokens of each head, among the best of all heads of all layers."""
    return best(score.flatten(1), view.budget.sum(-1)).view(score.shape).sum(-1)


METHOD = CachePage(
    config=Config,
    reread=lambda cfg: Rereading(cfg.whole, cfg.part, cfg.answer, cfg.chunk, cfg.lead),
    worth=worth,
    score=lambda view, cfg: view.notes(WORTH),
    always=always,
    allocate=allocate,
    across=True,
    phase="prefill",
    budget=lambda cfg: 0.3,
    patterns=("causal_self",),
    test_settings=(
        {"budget": 8, "chunk": 7, "lead": 2, "whole": (5, 9), "part": (5, 11, 7), "answer": (4,)},
    ),
    card=Card(
        title="KVzip",
        paper="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (arXiv:2505.23416)",
        year=2025,
        idea="what the model attends to while it repeats the prompt stays, for whatever is asked later",
        cost="a second reading of the prompt, twice its time and more; a cache that is whole until it is done",
        state="budget tokens of the prompt in the mean over all heads, and all that is generated",
        needs=("decoder-lm",),
        lineage=("snapkv", "adakv"),
        neutral={"budget": 1.0},
        caveat="the newest token stays in any case, so that a step has a key. Released code keeps a system prompt "
        "whole and knows where the chat template begins an answer; here the first `sinks` tokens stay, and `answer` "
        "says it. A layer that slides a window is not scored, as there, and keeps its newest tokens. A prompt with "
        "images is refused. A text of several turns is repeated turn by turn. With several texts in a batch a head "
        "holds memory for the longest of its rows",
    ),
)
