"""Recall: a page of text in which facts are strewn, and a question about one of them.

    ... text ... The code of quiet river is stone candle. ... The code of quiet garden is paper window. ...
    ... Question: the code of quiet garden is            -> " paper window"

The keys are pairs of words drawn from a small grid, so that most keys share a word with others: who finds
only half of the key answers with a distractor. There is one fact for 64 tokens, at least 4 and at most 24.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, continuation, encode, even, fill
from regard.tasks.corpus import Source, held_out

TOKENS_PER_FACT, MOST_FACTS = 64, 24


@dataclass(frozen=True)
class Fact:
    key: str
    value: str

    def statement(self, tokenizer) -> list[int]:
        begin = f"\nThe code of {self.key} is"
        return (
            encode(tokenizer, begin)
            + self.answer(tokenizer)
            + continuation(tokenizer, begin + self.value, ".")
        )

    def question(self, tokenizer) -> list[int]:
        return encode(tokenizer, f"\nQuestion: the code of {self.key} is")

    def answer(self, tokenizer) -> list[int]:
        return continuation(tokenizer, "code is", self.value)


@cache
def words() -> tuple[str, ...]:
    """The vocabulary of keys and values: common words of the corpus, four to seven letters."""
    return tuple((Path(__file__).parent / "data" / "words.txt").read_text(encoding="utf-8").split())


def near_keys(rng: random.Random, count: int) -> list[str]:
    """Different pairs of words; most share their first or their second word with another."""
    side = max(2, ceil(sqrt(1.5 * count)))
    drawn = rng.sample(words(), 2 * side)
    return [" ".join(pair) for pair in rng.sample(list(product(drawn[:side], drawn[side:])), count)]


def even_words(tokenizer) -> list[str]:
    """The words that take the same number of tokens, as few as leave a choice of 100."""
    groups: dict[int, list[str]] = {}
    for word in words():
        groups.setdefault(len(continuation(tokenizer, "code is", " " + word)), []).append(word)
    rich = [size for size in groups if len(groups[size]) >= 100]
    sizes = {size: len(group) for size, group in groups.items()}
    require(rich, "at least 100 words of one length in tokens", words_of_length=sizes)
    return groups[min(rich)]


def weave(rng: random.Random, filler: list[int], pieces: Iterable[list[int]]) -> tuple[list[int], list[int]]:
    """The pieces, in order, at random places of the filler -> the ids, and where each piece begins."""
    pieces = list(pieces)
    cuts = sorted(rng.randint(0, len(filler)) for _ in pieces)
    ids, starts, last = [], [], 0
    for cut, piece in zip(cuts, pieces, strict=True):
        ids += filler[last:cut]
        starts.append(len(ids))
        ids += piece
        last = cut
    return ids + filler[last:], starts


@dataclass(frozen=True)
class Config:
    tokens_per_fact: int = TOKENS_PER_FACT
    most_facts: int = MOST_FACTS

    def __post_init__(self) -> None:
        require(self.tokens_per_fact >= 1, "tokens_per_fact >= 1", tokens_per_fact=self.tokens_per_fact)
        require(self.most_facts >= 4, "most_facts >= 4", most_facts=self.most_facts)


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
    """`count` prompts of exactly `length` tokens; the asked facts spread evenly over the order of facts."""
    pool, source = even_words(tokenizer), source or held_out()
    number, result = min(cfg.most_facts, max(4, length // cfg.tokens_per_fact)), []
    for i in range(count):
        rng, index = random.Random(f"recall {seed} {i}"), round(i / max(1, count - 1) * (number - 1))
        result.append(one(tokenizer, length, index, rng, draw_facts(rng, pool, number), source, chat))
    return even(result)


def draw_facts(rng: random.Random, pool: list[str], number: int) -> list[Fact]:
    drawn = rng.sample(pool, 2 * number)
    values = [f" {a} {b}" for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    keys = near_keys(rng, number)
    # an answer must not stand anywhere else
    while any(" " + key in values for key in keys):
        keys = near_keys(rng, number)
    return [Fact(key, value) for key, value in zip(keys, values, strict=True)]


def one(
    tokenizer: Any, length: int, index: int, rng: random.Random, facts: list[Fact], source: Source, chat: bool
) -> Sample:
    frame = Frame.of(tokenizer, facts[index].question(tokenizer), f"The code of {facts[index].key} is", chat)
    statements = [fact.statement(tokenizer) for fact in facts]
    room = frame.room(length, sum(map(len, statements)))
    answer = facts[index].answer(tokenizer)
    body, starts = weave(rng, fill(tokenizer, source, rng, room, without=answer), statements)
    first = len(frame.head) + starts[index]
    return Sample(frame.around(body), answer, (first, first + len(statements[index])), depth=first / length)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    standard=True,
    patterns=("causal_self",),
    card=Card(
        title="Recall among similar keys",
        paper="none: a task of this library, after the key-value retrieval of Lost in the Middle (2023)",
        year=2026,
        idea="facts strewn through running text whose keys share words, and a question about one of them",
        cost="none",
        state="up to 24 facts to remember",
    ),
)
