"""Variables that pass a value on, and the question which of them have it.

    ... text ... VAR QXBTL = 48213. ... VAR MRZKE = VAR QXBTL. ... VAR HWNDA = VAR MRZKE. ...
    ... Question: Which variables have the value 48213?  -> QXBTL, MRZKE, HWNDA

A chain of h hops has h + 1 variables, each of which is assigned the one before it, further down in the text; the value
stands in the first assignment only. Other chains, with values of their own, are distractors; the paper's default has
none. A small example stands before the text, as in the paper.
"""

import random
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, encode
from regard.tasks.corpus import Source, held_out
from regard.tasks.ruler import distinct_numbers, free_sample, freely, listing, woven

GENERATED = 30  # the paper's
INTRO = "Variables are assigned in the text below. Follow them from one assignment to the next.\n"


@dataclass(frozen=True)
class Config:
    chains: int = 1  # the first is asked for
    hops: int = 4  # h, assignments after the first of a chain; h + 1 variables are asked for
    letters: int = 5  # of a name
    digits: int = 5  # of a value
    example: bool = True  # whether a chain with its question and answer, of three-letter names, comes first

    def __post_init__(self) -> None:
        require(1 <= self.chains <= 20, "1 <= chains <= 20", chains=self.chains)
        require(1 <= self.hops <= 20, "1 <= hops <= 20", hops=self.hops)
        require(4 <= self.letters <= 12, "4 <= letters <= 12", letters=self.letters)
        require(3 <= self.digits <= 12, "3 <= digits <= 12", digits=self.digits)


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
    """`count` prompts of exactly `length` tokens with chains of assignments, and one value asked for."""
    source = source or held_out()
    drawn = [
        one(cfg, tokenizer, length, random.Random(f"variable_tracking {seed} {i}"), source, chat)
        for i in range(count)
    ]
    return freely(tokenizer, drawn, GENERATED)


def one(cfg: Config, tokenizer: Any, length: int, rng: random.Random, source: Source, chat: bool) -> Sample:
    values = distinct_numbers(rng, cfg.chains + 1, cfg.digits)
    chains = [names(rng, cfg.hops + 1, cfg.letters) for _ in range(cfg.chains)]
    order = merged(rng, [assignments(chain, value) for chain, value in zip(chains, values, strict=False)])
    pieces = [encode(tokenizer, f"\n{text}\n") for _, text in order]
    intro = encode(tokenizer, INTRO + (example(rng, cfg, values[-1]) if cfg.example else ""))
    frame = Frame.freely(tokenizer, *asks(values[0], cfg.hops + 1), chat)
    wanted = tuple(chains[0])
    body = woven(tokenizer, frame, length, rng, source, intro, pieces, (*wanted, values[0]))
    spans = tuple(span for span, (chain, _) in zip(body.spans, order, strict=True) if chain == 0)
    return free_sample(frame, body, wanted, spans, 1 / cfg.chains if cfg.chains > 1 else 0.0)


def names(rng: random.Random, count: int, letters: int) -> list[str]:
    """Different names of capital letters; by their length those of chains and of the example are told apart."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return list(drawn)


def assignments(chain: list[str], value: str) -> list[str]:
    given = [value, *(f"VAR {name}" for name in chain)]
    return [f"VAR {name} = {of}." for name, of in zip(chain, given, strict=False)]


def merged(rng: random.Random, chains: list[list[str]]) -> list[tuple[int, str]]:
    """(chain, assignment) of all chains, mixed; those of a chain stay in order."""
    order = [i for i, chain in enumerate(chains) for _ in chain]
    rng.shuffle(order)
    left = [iter(chain) for chain in chains]
    return [(i, next(left[i])) for i in order]


def asks(value: str, count: int) -> tuple[str, str]:
    """The question, and how its answer begins."""
    question = f"\nQuestion: Which variables have the value {value} in the text above?"
    return question, f"The {count} variables that have the value {value} are"


def example(rng: random.Random, cfg: Config, value: str) -> str:
    """A question with its answer, on short names."""
    chain = names(rng, cfg.hops + 1, 3)
    question, reply = asks(value, len(chain))
    text = "\n".join(assignments(chain, value))
    return f"{text}{question}\nAnswer: {reply} {listing(chain)}.\n\n{INTRO}"


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"chains": 2, "hops": 3},),
    card=Card(
        title="Variable tracking",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="a value is passed on from variable to variable through the text; all that have it are asked for",
        cost="none",
        state="one assignment for each hop",
        caveat="the text between assignments is the user's or this library's, not the paper's five sentences. "
        "Generated are one and a half right answers and 8 tokens, at most the paper's 30, at least one right answer",
    ),
)
