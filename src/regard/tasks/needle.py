"""Needle: one fact in much text, at every depth in turn, and a question about it.

    ... text ... The code of garden is 48213. ... text ... Question: the code of garden is     -> " 48213"

The depth of sample i is i / (count - 1): 0 puts the fact first, 1 right before the question.
"""

import random
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, even, fill
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import Fact, answer_size, passkey, words


@dataclass(frozen=True)
class Config:
    digits: int = 5  # of the code

    def __post_init__(self) -> None:
        require(1 <= self.digits <= 20, "1 <= digits <= 20", digits=self.digits)


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
    """`count` prompts of exactly `length` tokens, the fact going down evenly from the first to the last."""
    source = source or held_out()
    size, result = answer_size(tokenizer, cfg.digits), []
    for i in range(count):
        depth, rng = i / max(1, count - 1), random.Random(f"needle {seed} {i}")
        result.append(one(tokenizer, length, depth, rng, source, (size, cfg.digits), chat))
    return even(result)


def one(
    tokenizer: Any,
    length: int,
    depth: float,
    rng: random.Random,
    source: Source,
    sizes: tuple[int, int],
    chat: bool,
) -> Sample:
    size, digits = sizes
    fact = Fact(rng.choice(words()), passkey(rng, digits))
    while len(fact.answer(tokenizer)) != size:
        fact = Fact(fact.key, passkey(rng, digits))
    frame = Frame.of(tokenizer, fact.question(tokenizer), f"The code of {fact.key} is", chat)
    statement, answer = fact.statement(tokenizer), fact.answer(tokenizer)
    room = frame.room(length, len(statement))
    filler, cut = fill(tokenizer, source, rng, room, without=answer), round(depth * room)
    first = len(frame.head) + cut
    prompt = frame.around(filler[:cut] + statement + filler[cut:])
    return Sample(prompt, answer, (first, first + len(statement)), depth)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    standard=True,
    patterns=("causal_self",),
    card=Card(
        title="Needle in a haystack",
        paper="Needle In A Haystack: pressure testing LLMs (G. Kamradt, 2023)",
        year=2023,
        idea="one fact in much running text, at every depth in turn, and a question about it at the end",
        cost="none",
        state="one fact to remember",
        caveat="the original asks for a sentence and lets a model judge; here a code of digits is generated exactly",
    ),
)
