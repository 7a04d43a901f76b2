"""Perplexity: running text, and how well the model foretells the 64 tokens that come next.

The windows are spread evenly over the text; the seed moves each within its share. No fact is asked for, so
there is no evidence. What is measured is the mean negative log-likelihood of the continuation in nats per
token.
"""

import random

from regard.core import require
from regard.tasks.base import Sample, Task, even, first_token
from regard.tasks.corpus import Source, held_out

CONTINUATION = 64


def samples(
    tokenizer, length: int, count: int, seed: int, source: Source | None = None, *, chat: bool = False
) -> list[Sample]:
    """`count` windows of `length` + 64 tokens; `chat` makes no difference: this is no conversation."""
    source, rng = source or held_out(), random.Random(f"perplexity {seed}")
    head, ids = first_token(tokenizer), source.ids(tokenizer)
    require(length > len(head), "length > the tokenizer's first tokens", length=length, first=len(head))
    cut = length - len(head)
    last = len(ids) - cut - CONTINUATION
    rule = f"length + {CONTINUATION} <= the text's tokens"
    require(last >= 0, rule, text=source.name, length=length, tokens=len(ids))
    starts = [int((i + rng.random()) / count * last) for i in range(count)]
    windows = (ids[s : s + cut + CONTINUATION] for s in starts)
    return even([Sample(head + w[:cut], w[cut:], evidence=(0, 0)) for w in windows])


PERPLEXITY = Task("perplexity", "Perplexity of held-out text", "nll", samples)
