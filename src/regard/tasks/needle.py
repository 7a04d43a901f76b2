"""Needle: one fact in much text, at every depth in turn, and a question about it.

    ... text ... The code of garden is 48213. ... text ... Question: the code of garden is     -> " 48213"

The depth of sample i is i / (count - 1): 0 puts the fact first, 1 right before the question.
"""

import random
from statistics import mode

from regard.tasks.base import Frame, Sample, Task, even, fill
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import Fact, words

DIGITS = 5


def samples(
    tokenizer, length: int, count: int, seed: int, source: Source | None = None, *, chat: bool = False
) -> list[Sample]:
    """`count` prompts of exactly `length` tokens, the fact going down evenly from the first to the last."""
    source = source or held_out()
    size, depths = answer_size(tokenizer), (i / max(1, count - 1) for i in range(count))
    return even(
        [_one(tokenizer, length, d, f"needle {seed} {i}", source, size, chat) for i, d in enumerate(depths)]
    )


def passkey(rng: random.Random) -> str:
    return " " + "".join(str(rng.randint(1, 9)) for _ in range(DIGITS))


def answer_size(tokenizer) -> int:
    """The commonest number of tokens of a passkey; it varies where a tokenizer merges digits."""
    rng = random.Random("passkeys")
    return mode(len(Fact("", passkey(rng)).answer(tokenizer)) for _ in range(100))


def _one(tokenizer, length: int, depth: float, seed: str, source: Source, size: int, chat: bool) -> Sample:
    rng = random.Random(seed)
    fact = Fact(rng.choice(words()), passkey(rng))
    while len(fact.answer(tokenizer)) != size:
        fact = Fact(fact.key, passkey(rng))
    frame = Frame.of(tokenizer, fact.question(tokenizer), f"The code of {fact.key} is", chat)
    statement, answer = fact.statement(tokenizer), fact.answer(tokenizer)
    room = frame.room(length, len(statement))
    filler, cut = fill(tokenizer, source, rng, room, without=answer), round(depth * room)
    first = len(frame.head) + cut
    prompt = frame.around(filler[:cut] + statement + filler[cut:])
    return Sample(prompt, answer, (first, first + len(statement)), depth)


NEEDLE = Task("needle", "Needle in a haystack", "exact", samples)
