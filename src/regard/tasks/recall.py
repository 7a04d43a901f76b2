"""Recall: a page of text in which facts are strewn, and a question about one of them.

    ... text ... The code of quiet river is 482. ... The code of quiet garden is 917. ...
    ... Question: the code of quiet garden is            -> " 917"

The keys are pairs of words drawn from a small grid, so that most keys share a word with others: who finds
only half of the key answers with a distractor. There is one fact for 64 tokens, at least 4 and at most 24; who
answers with any of them is right once in so many times. Codes are digits, which models that were not trained on
this page take for codes too; `values="words"` gives pairs of words, the form that the shipped model has learned.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, sqrt
from pathlib import Path
from statistics import mode
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, check_writes, continuation, encode, even, fill
from regard.tasks.corpus import Source, held_out

TOKENS_PER_FACT, MOST_FACTS = 64, 24
DIGITS = 3


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
    side = grid_side(count)
    drawn = rng.sample(words(), 2 * side)
    return [" ".join(pair) for pair in rng.sample(list(product(drawn[:side], drawn[side:])), count)]


def near_pairs(rng: random.Random, count: int, firsts: Sequence[str], seconds: Sequence[str]) -> list[str]:
    """The same of first and second words that are told apart, such as names."""
    some = [rng.sample(words, grid_side(count)) for words in (firsts, seconds)]
    return [" ".join(pair) for pair in rng.sample(list(product(*some)), count)]


def grid_side(count: int) -> int:
    """How many first and how many second words make up so many pairs, most of which share one."""
    return max(2, ceil(sqrt(1.5 * count)))


def even_words(tokenizer) -> list[str]:
    """The words that take the same number of tokens, as few as leave a choice of 100."""
    groups: dict[int, list[str]] = {}
    for word in words():
        groups.setdefault(len(continuation(tokenizer, "code is", " " + word)), []).append(word)
    rich = [size for size in groups if len(groups[size]) >= 100]
    sizes = {size: len(group) for size, group in groups.items()}
    require(rich, "at least 100 words of one length in tokens", words_of_length=sizes)
    return groups[min(rich)]


def passkey(rng: random.Random, digits: int) -> str:
    return " " + "".join(str(rng.randint(1, 9)) for _ in range(digits))


def answer_size(tokenizer: Any, digits: int) -> int:
    """The commonest number of tokens of a passkey; it varies where a tokenizer merges digits."""
    check_writes(tokenizer, "1234567890")
    rng = random.Random("passkeys")
    return mode(len(Fact("", passkey(rng, digits)).answer(tokenizer)) for _ in range(100))


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
    tokens_per_fact: int = TOKENS_PER_FACT  # tokens of the prompt for each fact; 4 facts at least
    most_facts: int = MOST_FACTS  # limit of the facts, however long the prompt
    values: str = "digits"  # or "words"

    def __post_init__(self) -> None:
        require(self.tokens_per_fact >= 1, "tokens_per_fact >= 1", tokens_per_fact=self.tokens_per_fact)
        require(4 <= self.most_facts <= 99, "4 <= most_facts <= 99", most_facts=self.most_facts)
        require(self.values in VALUES, f"values is one of {', '.join(VALUES)}", values=self.values)


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
    draw, source = VALUES[cfg.values](tokenizer), source or held_out()
    number, result = min(cfg.most_facts, max(4, length // cfg.tokens_per_fact)), []
    for i in range(count):
        rng, index = random.Random(f"recall {seed} {i}"), round(i / max(1, count - 1) * (number - 1))
        result.append(one(tokenizer, length, index, rng, draw_facts(rng, draw, number), source, chat))
    return even(result)


Draw = Callable[[random.Random, int], list[str]]  # so many different values, all equally long in tokens


def pairs_of_words(tokenizer: Any) -> Draw:
    pool = even_words(tokenizer)

    def draw(rng: random.Random, number: int) -> list[str]:
        drawn = rng.sample(pool, 2 * number)
        return [f" {a} {b}" for a, b in zip(drawn[::2], drawn[1::2], strict=True)]

    return draw


def codes(tokenizer: Any) -> Draw:
    size = answer_size(tokenizer, DIGITS)

    def draw(rng: random.Random, number: int) -> list[str]:
        values: dict[str, None] = {}
        while len(values) < number:
            value = passkey(rng, DIGITS)
            if len(Fact("", value).answer(tokenizer)) == size:
                values[value] = None
        return list(values)

    return draw


VALUES: dict[str, Callable[[Any], Draw]] = {"digits": codes, "words": pairs_of_words}


def draw_facts(rng: random.Random, draw: Draw, number: int) -> list[Fact]:
    values, keys = draw(rng, number), near_keys(rng, number)
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
    evidence = (first, first + len(statements[index]))
    return Sample(frame.around(body), answer, evidence, depth=first / length, chance=1 / len(facts))


METHOD = TaskPage(
    config=Config,
    samples=samples,
    standard=True,
    patterns=("causal_self",),
    test_settings=({"values": "words"},),
    card=Card(
        title="Recall among similar keys",
        paper="none: a task of this library, after the key-value retrieval of Lost in the Middle (2023)",
        year=2026,
        idea="facts strewn through running text whose keys share words, and a question about one of them",
        cost="none",
        state="up to 24 facts to remember",
        caveat="pairs of words are no codes to a model that was not trained on them; the shipped one answers both",
    ),
)
