"""Frequent words: words of no language, as often as their rank says; the most frequent are asked for.

    count(k) = floor( n · k^-α / ζ(α) )        of the word of rank k, among n words in all
    Text: ... qhzrtw ... ... bnmokp qhzrtw ... ...
    Question: Which are the 3 words that come most often?      -> the words of rank 2, 3, 4

The word of rank 1 is noise, three dots. α = 2 as in the paper: one word in 1.64 is noise, one in 6.6 is the most
frequent word, one in 26 the last that is asked for. n is as large as the prompt has room for.

>>> counts(100, 2.0)
[60, 15, 6, 3, 2, 1, 1]
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, encode, fill_around
from regard.tasks.corpus import Source, held_out
from regard.tasks.ruler import Body, free_sample, freely

GENERATED = 50  # the paper's
NOISE = " ..."
INTRO = "Count how often each coded word comes in the text below. The dots do not count.\nText:"


@dataclass(frozen=True)
class Config:
    asked: int = 3  # words that are asked for, those of ranks 2 to asked + 1
    alpha: float = 2.0  # α; larger: counts fall faster with the rank
    letters: int = 6  # of a coded word

    def __post_init__(self) -> None:
        require(1 <= self.asked <= 10, "1 <= asked <= 10", asked=self.asked)
        require(1.1 <= self.alpha <= 4, "1.1 <= alpha <= 4", alpha=self.alpha)
        require(4 <= self.letters <= 12, "4 <= letters <= 12", letters=self.letters)


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
    """`count` prompts of exactly `length` tokens: coded words, and the most frequent asked for.

    What one more word has no room for is noise, and running text before them where one token more is no noise.
    """
    source = source or held_out()
    drawn = [
        one(cfg, tokenizer, length, random.Random(f"frequent_words {seed} {i}"), source, chat)
        for i in range(count)
    ]
    return freely(tokenizer, drawn, GENERATED)


def one(cfg: Config, tokenizer: Any, length: int, rng: random.Random, source: Source, chat: bool) -> Sample:
    frame, intro = Frame.freely(tokenizer, *asks(cfg.asked), chat), encode(tokenizer, INTRO)
    room = frame.room(length, len(intro))
    coded = coder(rng, cfg.letters)
    ranks, often = fitted(tokenizer, coded, room, cfg.alpha)
    rule = "the words asked for are told from the next by their counts: the text is long enough"
    clear = len(often) > cfg.asked and often[cfg.asked] > [*often, 0][cfg.asked + 1]
    require(clear, rule, length=length, counts=often)
    left = room - sum(len(ids) * times for ids, times in zip(ranks, often, strict=False))
    often[0] += left // len(ranks[0])
    words = [(k, ids) for k, (ids, times) in enumerate(zip(ranks, often, strict=False)) for _ in range(times)]
    rng.shuffle(words)
    wanted = tuple(coded(k) for k in range(1, cfg.asked + 1))
    before = fill_around(tokenizer, source, rng, left % len(ranks[0]), wanted)
    ids, spans = before + intro, []
    for k, piece in words:
        if 1 <= k <= cfg.asked:
            spans.append((len(frame.head) + len(ids), len(frame.head) + len(ids) + len(piece)))
        ids = ids + piece
    return free_sample(frame, Body(ids, spans), wanted, tuple(spans), 0.0)


def coder(rng: random.Random, letters: int) -> Callable[[int], str]:
    """The coded word of each rank from 1 on, drawn when it is first asked for; none is another's."""
    drawn: list[str] = []

    def coded(k: int) -> str:
        while len(drawn) < k:
            word = "".join(rng.choices(ascii_lowercase, k=letters))
            drawn.extend([word] if word not in drawn else [])
        return drawn[k - 1]

    return coded


def fitted(
    tokenizer: Any, coded: Callable[[int], str], room: int, alpha: float
) -> tuple[list[list[int]], list[int]]:
    """The ids of each rank's word, noise first, and how often each comes: as many words as there is room for."""
    pieces = [encode(tokenizer, NOISE)]

    def taken(n: int) -> int:
        times = counts(n, alpha)
        while len(pieces) < len(times):
            pieces.append(encode(tokenizer, f" {coded(len(pieces))}"))
        return sum(len(ids) * c for ids, c in zip(pieces, times, strict=False))

    most = int(zeta(alpha) * room) + 2  # noise alone would take more
    n = bisect_right(range(most), room, key=taken) - 1
    return pieces, counts(n, alpha)


def counts(n: int, alpha: float) -> list[int]:
    """How often the words of rank 1, 2, ... come among n, as long as they come at all."""
    whole, result = zeta(alpha), []
    while (times := int(n * (len(result) + 1) ** -alpha / whole)) >= 1:
        result.append(times)
    return result


@cache
def zeta(alpha: float, terms: int = 1000) -> float:
    """Σ k^-α over k from 1 on: the first terms, and the integral of the others.

    >>> round(zeta(2.0), 6)
    1.644934
    """
    first = sum(k**-alpha for k in range(1, terms))
    return first + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2


def asks(count: int) -> tuple[str, str]:
    """The question, and how its answer begins."""
    which = f"the {count} coded words that come most often"
    return f"\nQuestion: Which are {which} in the text above?", f"T{which[1:]} are"


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"asked": 2, "letters": 5},),
    card=Card(
        title="Frequent words",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="words of no language whose counts follow a zeta distribution; the three most frequent are asked for",
        cost="none",
        state="how often each word came",
        caveat="the user's text fills only what one more word has no room for. Generated are one and a half right "
        "answers and 8 tokens, at most the paper's 50, at least one right answer",
    ),
)
