"""Non-causal attention: tokens that their neighbourhood reads stay, whichever way it has to look.

    A_j = mean_h Σ_{i in chunk of j} softmax_{l in chunk}(q_i · k_l)_j      earlier and later tokens, no scale
    s_j = mean over j-1, j, j+1 of  A_j |v_j|₂
    keep the budget's best s, by head, after the prompt

where q are the queries of the prompt itself, h the query heads that share a key, and chunks are of its tokens. A causal
sum favours early tokens, which more queries see; here each token is seen by all of its chunk and the sums of a chunk
are 1 on average. What stays is chosen before any question is known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32
from regard.ops.leverage import seen_both_ways


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    chunk: int = 256  # tokens that attend to each other

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def observe(view: View, cfg: Config) -> None:
    """Queries are gone after their step, so what a prompt's tokens are worth is noted then."""
    if view.phase == "prefill":
        view.notes("worth").add_(seen_both_ways(view, cfg.chunk))


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: what was noted; a token that was generated is a chunk of its own, of which A is 1."""
    noted = view.notes("worth")
    alone = view.by_cache_head(at_least_float32(view.v).norm(dim=-1))
    return torch.where(noted > 0, noted, alone)


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Non-causal attention (of Compactor)",
        paper="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        year=2025,
        idea="tokens of a prompt attend to each other in chunks, both ways; those that receive most stay",
        cost="N · chunk scores for each query head, after the prompt",
        state="budget tokens per head of the prompt and all that is generated, with one number each",
        needs=("decoder-lm",),
        lineage=("h2o", "snapkv"),
        neutral={"budget": 1.0},
        caveat="scores have no 1/√D, as in both releases of the authors (kvpress and compactor-vllm). There the last, "
        "shorter chunk is filled up with empty tokens, which add to the sums; here it stands for itself. At the ends "
        "of a prompt kvpress takes a missing neighbour for 0, here the mean is over those that are there; "
        "compactor-vllm has chunks of 128 and neither |v| nor neighbours. A turn's tokens are judged by their own "
        "turn, and the newest stays in any case",
    ),
)
