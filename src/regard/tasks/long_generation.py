"""Long generation: facts in a text that counts as written by the model itself, and a question about one of them.

    context: text        written, a token at a time: ... The code of quiet river is 482. ... text ...
    Question: What is the code of quiet river in the text above?     -> 482

Policies that compress a prompt once never meet these facts; those that evict while a model decodes meet each of them on
its way in, and have to keep it until it is asked for. In a chat the written text is the model's message.
"""

import random
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, chat_marks, encode, even, fill, first_token, next_question
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import MOST_FACTS, TOKENS_PER_FACT, Fact, codes, even_words, weave
from regard.tasks.ruler import asks_for, pairs_of_words

BEGIN = "Continue this text, and write some codes into it that are asked for at the end.\n"
SHORTEST = 8  # tokens of the text that the prompt begins with


@dataclass(frozen=True)
class Config:
    written: float = 0.75  # share of the prompt beside its marks and question
    tokens_per_fact: int = TOKENS_PER_FACT  # tokens of the prompt for each fact; 4 facts at least
    most_facts: int = MOST_FACTS  # limit of the facts, however long the prompt

    def __post_init__(self) -> None:
        require(0 < self.written < 1, "0 < written < 1", written=self.written)
        require(self.tokens_per_fact >= 1, "tokens_per_fact >= 1", tokens_per_fact=self.tokens_per_fact)
        require(4 <= self.most_facts <= 99, "4 <= most_facts <= 99", most_facts=self.most_facts)


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
    draw, pool, source = codes(tokenizer), even_words(tokenizer), source or held_out()
    number, result = min(cfg.most_facts, max(4, length // cfg.tokens_per_fact)), []
    for i in range(count):
        rng, index = random.Random(f"long_generation {seed} {i}"), round(i / max(1, count - 1) * (number - 1))
        keys = pairs_of_words(rng, number, pool)
        facts = [Fact(key, value) for key, value in zip(keys, draw(rng, number), strict=True)]
        result.append(one(cfg, tokenizer, length, rng, index, facts, source, chat))
    return even(result)


def one(
    cfg: Config,
    tokenizer: Any,
    length: int,
    rng: random.Random,
    index: int,
    facts: list[Fact],
    source: Source,
    chat: bool,
) -> Sample:
    fact, statements = facts[index], [f.statement(tokenizer) for f in facts]
    opening, middle, tail = conversation(tokenizer, fact, chat)
    room, taken = Frame(opening + middle, tail).room(length, 0), sum(map(len, statements))
    written = int(cfg.written * room)
    start = room - written
    rule = f"the written share has room for the facts, and what is left of the rest for {SHORTEST} tokens of text"
    fits = written >= taken and start >= SHORTEST
    require(fits, rule, length=length, written=written, facts=taken, text=start)
    answer = fact.answer(tokenizer)
    text = fill(tokenizer, source, rng, start + written - taken, without=answer)
    body, starts = weave(rng, text[start:], statements)
    context = opening + text[:start] + middle
    first = len(context) + starts[index]
    evidence = (first, first + len(statements[index]))
    depth, chance = first / length, 1 / len(facts)
    return Sample(context + body + tail, answer, evidence, depth, chance, len(context), written)


def conversation(tokenizer: Any, fact: Fact, chat: bool) -> tuple[list[int], list[int], list[int]]:
    """What stands before the text that is given, between it and the text that is written, and after that."""
    tail = next_question(tokenizer, *asks_for(fact.key), chat)
    if not chat:
        return first_token(tokenizer), [], tail
    before, reply, *_ = chat_marks(tokenizer, 3)
    return encode(tokenizer, before + BEGIN), encode(tokenizer, reply), tail


METHOD = TaskPage(
    config=Config,
    samples=samples,
    patterns=("causal_self",),
    test_settings=({"written": 0.5},),
    card=Card(
        title="Facts in what the model wrote",
        paper="none: a task of this library, for policies that evict while a model decodes",
        year=2026,
        idea="facts strewn through a long text that is fed one token at a time as if generated, then a question",
        cost="none",
        state="up to 24 facts to remember",
        lineage=("recall",),
        caveat="the text was not written by the model that reads it; each token of it is a step of decoding, so a cell "
        "takes as many steps as the prompt is long",
    ),
)
