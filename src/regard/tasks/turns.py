"""Turns: one context is read, then several questions about it follow that nobody knew when it was compressed.

    ... text ... The code of quiet river is 482. ... The code of early garden is 917. ...      the context
    Question: What is the code of early garden in the text above? -> 917.   Question: What is the code of ...

A method that chooses by a question what to keep looks good on this question and loses what the next one asks for:
SCBench's finding. Here the context is read and compressed alone and the first question is a stranger too.
With `known=True` the first question is read with the context, as in the multi-turn mode of SCBench: then the first
turn is the one that the choice was made for, and the later ones show what it cost. Facts are as many as those of
`recall`; keys share no words, and their words take the same number of tokens, so that turns are equally long.
"""

import random
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, Turn, contains, even, fill, next_question
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import (
    MOST_FACTS,
    TOKENS_PER_FACT,
    Fact,
    codes,
    even_words,
    weave,
)
from regard.tasks.ruler import asks_for, pairs_of_words


@dataclass(frozen=True)
class Config:
    questions: int = 4  # asked one after the other, each about another fact
    known: bool = False  # the first question is read with the context
    # tokens of the prompt for each fact; at least 4 facts, and one for each question
    tokens_per_fact: int = TOKENS_PER_FACT
    most_facts: int = MOST_FACTS  # limit of the facts, however long the prompt

    def __post_init__(self) -> None:
        require(2 <= self.questions <= 24, "2 <= questions <= 24", questions=self.questions)
        require(self.tokens_per_fact >= 1, "tokens_per_fact >= 1", tokens_per_fact=self.tokens_per_fact)
        require(
            max(4, self.questions) <= self.most_facts <= 99,
            "questions, and 4, <= most_facts <= 99",
            most_facts=self.most_facts,
            questions=self.questions,
        )


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
    """`count` prompts of exactly `length` tokens up to the first answer; the further questions come after it."""
    draw, pool, source = codes(tokenizer), even_words(tokenizer), source or held_out()
    number = min(cfg.most_facts, max(4, cfg.questions, length // cfg.tokens_per_fact))
    result = []
    for i in range(count):
        rng = random.Random(f"turns {seed} {i}")
        keys = pairs_of_words(rng, number, pool)
        facts = [Fact(key, value) for key, value in zip(keys, draw(rng, number), strict=True)]
        result.append(one(cfg, tokenizer, length, rng, facts, source, chat))
    return even(result)


def one(
    cfg: Config,
    tokenizer: Any,
    length: int,
    rng: random.Random,
    facts: list[Fact],
    source: Source,
    chat: bool,
) -> Sample:
    asked = rng.sample(range(len(facts)), cfg.questions)
    first, *later = [facts[i] for i in asked]
    frame = Frame.freely(tokenizer, *asks_for(first.key), chat)
    statements = [fact.statement(tokenizer) for fact in facts]
    room = frame.room(length, sum(map(len, statements)))
    body, starts = weave(rng, text_for(tokenizer, source, rng, room, facts, asked), statements)
    head = len(frame.head)
    spans = tuple((head + starts[i], head + starts[i] + len(statements[i])) for i in asked)
    asks = [next_question(tokenizer, *asks_for(fact.key), chat, stop=".") for fact in later]
    turns = tuple(Turn(ask, fact.answer(tokenizer)) for ask, fact in zip(asks, later, strict=True))
    return Sample(
        frame.around(body),
        first.answer(tokenizer),
        spans[0],
        depth=spans[0][0] / length,
        chance=1 / len(facts),
        context=0 if cfg.known else head + len(body),
        turns=turns,
        facts=spans,
    )


def text_for(
    tokenizer: Any, source: Source, rng: random.Random, room: int, facts: list[Fact], asked: list[int]
) -> list[int]:
    """Running text in which no answer of any turn occurs."""
    for _ in range(100):
        text = fill(tokenizer, source, rng, room, without=facts[asked[0]].answer(tokenizer))
        if not any(contains(text, facts[i].answer(tokenizer)) for i in asked):
            return text
    raise ValueError(f"filler without the answers of all turns: not found in 100 draws from {source.name}")


METHOD = TaskPage(
    config=Config,
    samples=samples,
    patterns=("causal_self",),
    test_settings=({"known": True}, {"questions": 2}),
    card=Card(
        title="Several questions about one context",
        paper="SCBench: A KV Cache-Centric Analysis of Long-Context Methods (ICLR 2025)",
        year=2024,
        idea="a context is compressed once, before any of the questions that are asked about it in turn is known",
        cost="none",
        state="all facts of the context: nobody knows which will be asked for",
        lineage=("recall",),
        caveat="the right answer of a turn is fed before the next question, whatever the method said, so that turns "
        "are told apart; in the paper the model goes on with its own",
    ),
)
