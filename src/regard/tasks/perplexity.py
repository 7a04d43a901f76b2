"""Perplexity: running text, and how well the model foretells the 64 tokens that come next.

The windows are spread evenly over the text; the seed moves each within its share. No fact is asked for, so
there is no evidence. What is measured is the mean negative log-likelihood of the continuation in nats per
token.
"""

import random
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Sample, even, first_token
from regard.tasks.corpus import Source, held_out

CONTINUATION = 64


@dataclass(frozen=True)
class Config:
    continuation: int = CONTINUATION  # tokens that are scored

    def __post_init__(self) -> None:
        require(self.continuation >= 1, "continuation >= 1", continuation=self.continuation)


def samples(
    cfg: Config,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None = None,
    *,
    chat: bool = False,
) -> list[Sample]:
    """`count` windows of `length` + continuation tokens; `chat` makes no difference: this is no conversation."""
    scored = cfg.continuation
    source, rng = source or held_out(), random.Random(f"perplexity {seed}")
    head, ids = first_token(tokenizer), source.ids(tokenizer)
    require(length > len(head), "length > the tokenizer's first tokens", length=length, first=len(head))
    cut = length - len(head)
    last = len(ids) - cut - scored
    rule = f"length + {scored} <= the text's tokens"
    require(last >= 0, rule, text=source.name, length=length, tokens=len(ids))
    starts = [int((i + rng.random()) / count * last) for i in range(count)]
    windows = (ids[s : s + cut + scored] for s in starts)
    return even([Sample(head + w[:cut], w[cut:], evidence=(0, 0)) for w in windows])


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="nll",
    standard=True,
    patterns=("causal_self",),
    card=Card(
        title="Perplexity of held-out text",
        paper="Perplexity: a measure of the difficulty of speech recognition tasks (F. Jelinek and others, 1977)",
        year=1977,
        idea="running text, and how well the model foretells the tokens that come next",
        cost="none",
        state="none in particular",
    ),
)
