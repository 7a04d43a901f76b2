"""TOVA: token omission via attention. Whatever the newest query looks at least goes, at every step.

    s_j = (1/H) Σ_h softmax(q_n K)_{h,j}      q_n the newest query, averaged over all H heads of the layer
    keep the budget's best s                  one set of tokens for all heads, after the prompt and after each token

where a decoder with a cache of fixed size is a recurrent network whose state is its tokens: the newest one comes in,
and the one that matters least to it leaves. No window, no sinks and no sum over the past are set by hand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.cache import CachePage
from regard.ops import Budget, View
from regard.ops.texts import as_stored, in_text


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: an eighth of the text


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: the same for a token in every head."""
    every = view.beside or (view,)
    heads = sum(other.q.shape[1] for other in every)
    if len(every) > 1:
        texts = [in_text(other, other.received(newest=1) / heads).sum(1, keepdim=True) for other in every]
        return as_stored(view, torch.stack(texts).sum(0))
    votes = view.received(newest=1) / heads
    if view.index.shape[1] == 1 or bool((view.index == view.index[:, :1]).all()):
        return votes.sum(1, keepdim=True).expand_as(votes)
    # heads that another method let keep tokens of their own: those of one token are found by its place in the text
    return as_stored(view, in_text(view, votes).sum(1, keepdim=True))


METHOD = CachePage(
    config=Config,
    score=score,
    budget=lambda cfg: 0.125,
    patterns=("causal_self",),
    card=Card(
        title="TOVA: Token Omission Via Attention",
        paper="Transformers are Multi-State RNNs (arXiv:2401.06104)",
        year=2024,
        idea="at every step the token that the newest query attends to least goes, one for all heads",
        cost="the weights of one query, which a step of decoding computes anyway",
        state="budget tokens, the same in all heads of a layer",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="the newest token stays in any case, which the paper leaves to its own weight. Where heads hold "
        "different numbers of tokens because another method parted them, as in razor_attention+then+tova, each group "
        "of heads of one length votes for itself",
    ),
)
