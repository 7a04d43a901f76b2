"""Perplexity: running text, and how well the model foretells the 64 tokens that come next.

The windows are spread evenly over the text; the seed moves each within its share. No fact is asked for, so there is
no evidence. What is measured is the mean negative log-likelihood of the continuation in nats per token.
"""

import random

from regard.core import require
from regard.tasks.base import Sample, Task, even, first_token
from regard.tasks.corpus import Source, held_out

CONTINUATION = 64


def samples(
    tokenizer, length: int, count: int, seed: int, source: Source | None = None, *, chat: bool = False
) -> list[Sample]:
    """`count` windows of `length` + 64 tokens. `chat` makes no difference: running text is not a conversation."""
    source, rng = source or held_out(), random.Random(f"perplexity {seed}")
    head, ids = first_token(tokenizer), source.ids(tokenizer)
    require(length > len(head), "length > the tokenizer's first tokens", length=length, first=len(head))
    cut = length - len(head)
    last = len(ids) - cut - CONTINUATION
    require(last >= 0, f"length + {CONTINUATION} <= the text's tokens", length=length, tokens=len(ids), text=source.name)
    starts = [int((i + rng.random()) / count * last) for i in range(count)]
    return even(
        [Sample(head + ids[s : s + cut], ids[s + cut : s + cut + CONTINUATION], evidence=(0, 0)) for s in starts]
    )


PERPLEXITY = Task("perplexity", "Perplexity of held-out text", "nll", samples)
