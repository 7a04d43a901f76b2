"""Common words: a list in which a few words come often and the others seldom; the common ones are asked for.

    Words: river garden river paper river garden stone ...
    Question: Which are the 10 words that come most often in the list above?    -> river, garden, ...

Below 4,096 tokens common words come 6 times and others once, from there on 30 and 3 times, as in the paper; where the
vocabulary has too few other words for a long list, both come so many times as often. A small example stands before the
list. The answer is nowhere: it has to be counted, so a method that reads a share of the list must read a fair one.
"""

import random
from dataclasses import dataclass
from math import ceil
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, continuation, encode, fill_around
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import even_words
from regard.tasks.ruler import Body, free_sample, freely, listing

GENERATED = 120  # the paper's
LONG = 4096  # tokens, from which on words are repeated more often
REPEATS = {False: (6, 1), True: (30, 3)}  # of common and of other words, by whether the prompt is long
EXAMPLES = {False: (3, 1), True: (10, 3)}
INTRO = (
    "Some words come more often than others in the list below. Remember those that come most often.\nWords:"
)


@dataclass(frozen=True)
class Config:
    common: int = 10  # words that come often and are asked for
    example: bool = True  # whether a small list with its question and answer stands before the list

    def __post_init__(self) -> None:
        require(1 <= self.common <= 40, "1 <= common <= 40", common=self.common)


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
    """`count` prompts of exactly `length` tokens: a list of words, and the commonest asked for.

    What one more word has no room for is running text before the list.
    """
    pool, source = vocabulary(tokenizer), source or held_out()
    drawn = [
        one(cfg, tokenizer, length, random.Random(f"common_words {seed} {i}"), pool, source, chat)
        for i in range(count)
    ]
    return freely(tokenizer, drawn, GENERATED)


def vocabulary(tokenizer: Any) -> list[str]:
    """Words of one length in tokens, none of which stands within another or in the text around the list."""
    said = " ".join([INTRO, *asks(10)]).lower()
    pool = [word for word in even_words(tokenizer) if word not in said]
    listed = "\n".join(pool)
    return [word for word in pool if listed.count(word) == 1]


def one(
    cfg: Config,
    tokenizer: Any,
    length: int,
    rng: random.Random,
    pool: list[str],
    source: Source,
    chat: bool,
) -> Sample:
    n, long, drawn = cfg.common, length >= LONG, rng.sample(pool, len(pool))
    rule = "there are four times as many words of one length in tokens as common ones"
    require(len(pool) >= 4 * n, rule, words=len(pool), common=n)
    common, rest = drawn[:n], drawn[3 * n :]  # the example has words of its own
    text = (example(rng, drawn[n : 2 * n], drawn[2 * n : 3 * n], long) if cfg.example else "") + INTRO
    frame = Frame.freely(tokenizer, *asks(cfg.common), chat)
    intro, size = encode(tokenizer, text), len(continuation(tokenizer, "code is", f" {common[0]}"))
    room = frame.room(length, len(intro))
    words = mixed(rng, common, rest, room // size, long)
    listed = [i for word in words for i in continuation(tokenizer, "code is", f" {word}")]
    before = fill_around(tokenizer, source, rng, room - len(listed), tuple(common))
    body, first = before + intro + listed, len(frame.head) + len(before) + len(intro)
    spans = [(first + size * i, first + size * (i + 1)) for i, word in enumerate(words) if word in common]
    return free_sample(frame, Body(body, spans), tuple(common), tuple(spans), len(common) / len(set(words)))


def mixed(rng: random.Random, common: list[str], rest: list[str], entries: int, long: bool) -> list[str]:
    """A list of so many words, common ones often and others seldom, in any order."""
    often, seldom = REPEATS[long]
    more = max(1, ceil(entries / (often * len(common) + seldom * len(rest))))
    often, seldom = more * often, more * seldom
    left = entries - often * len(common)
    rule = "the list has room for the common words and for as many others"
    require(left >= len(common), rule, room=entries, common=len(common), times=often)
    others = [word for word in rest for _ in range(seldom)][:left]
    words = common * often + others
    rng.shuffle(words)
    return words


def asks(count: int) -> tuple[str, str]:
    """The question, and how its answer begins."""
    which = f"the {count} words that come most often"
    return f"\nQuestion: Which are {which} in the list above?", f"T{which[1:]} are"


def example(rng: random.Random, common: list[str], others: list[str], long: bool) -> str:
    """A short list with its question and answer, as text before the list."""
    often, seldom = EXAMPLES[long]
    words = common * often + others * seldom
    rng.shuffle(words)
    question, reply = asks(len(common))
    return f"{INTRO} {' '.join(words)}{question}\nAnswer: {reply} {listing(common)}.\n\n"


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    card=Card(
        title="Common words",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="a list in which ten words come six to ten times as often as the others; they are asked for",
        cost="none",
        state="how often each word came",
        caveat="the list is not numbered, since numbers would take most of its tokens, and the user's text fills only "
        "what one more word has no room for. Generated are one and a half right answers and 8 tokens, at most the "
        "paper's 120, at least one right answer",
    ),
)
