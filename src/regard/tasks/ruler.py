"""What the pages after RULER share: needles, texts woven into filler, answers that are generated freely.

RULER (RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024) gives the forms and the
figures: how many keys, values, hops and words, how often words are repeated, how many tokens are generated at most.
The wording is this library's own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from regard.core import require
from regard.tasks.base import Frame, Sample, check_writes, continuation, encode, even, fill_around
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import weave, words

SLACK = 8  # tokens that are generated beyond one and a half right answers
NEEDLE_TOKENS = 128  # RULER's bound of what is generated on needles
INTRO = "Some codes are hidden in the text below. Remember them: some will be asked for at the end.\n"


@dataclass(frozen=True)
class Body:
    """Ids between the frame's head and its tail, and where each piece of them stands in the prompt."""

    ids: list[int]
    spans: list[tuple[int, int]]


def listing(texts: Sequence[str]) -> str:
    """
    >>> listing(["one"]), listing(["one", "two", "three"])
    ('one', 'one, two and three')
    """
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def freely(tokenizer: Any, samples: list[Sample], most: int) -> list[Sample]:
    """The same samples, each with room for its answer: one and a half right answers, at most `most` tokens.

    Never fewer than the longest right answer takes; RULER's bound is too small for it in tokenizers of few characters.
    """
    for text in dict.fromkeys(wanted for sample in samples for wanted in sample.wanted):
        check_writes(tokenizer, text)
    right = [continuation(tokenizer, "are", f" {listing(s.wanted)}.") for s in samples]
    longest = max(map(len, right))
    count = max(longest, min(most, ceil(1.5 * longest) + SLACK))
    return even([replace(s, answer=(ids * count)[:count]) for s, ids in zip(samples, right, strict=True)])


def woven(
    tokenizer: Any,
    frame: Frame,
    length: int,
    rng: random.Random,
    source: Source,
    intro: list[int],
    pieces: list[list[int]],
    wanted: tuple[str, ...],
) -> Body:
    """The pieces, in order, at random places of as much running text without the wanted texts as there is room for."""
    room = frame.room(length, len(intro) + sum(map(len, pieces)))
    ids, starts = weave(rng, fill_around(tokenizer, source, rng, room, wanted), pieces)
    first = len(frame.head) + len(intro)
    spans = [(first + s, first + s + len(piece)) for s, piece in zip(starts, pieces, strict=True)]
    return Body(intro + ids, spans)


def number(rng: random.Random, digits: int) -> str:
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def distinct_numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    rule = "there are ten times as many numbers of so many digits as are drawn"
    require(9 * 10 ** (digits - 1) >= 10 * count, rule, digits=digits, drawn=count)
    values: dict[str, None] = {}
    while len(values) < count:
        values[number(rng, digits)] = None
    return list(values)


def pairs_of_words(rng: random.Random, count: int, pool: Sequence[str] = ()) -> list[str]:
    """Keys of two words, of the pool or of all; none shares a word with another."""
    pool = pool or words()
    require(2 * count <= len(pool), "there are two words for each key", words=len(pool), keys=count)
    drawn = rng.sample(pool, 2 * count)
    return [f"{a} {b}" for a, b in zip(drawn[::2], drawn[1::2], strict=True)]


def check_needles(digits: int, distractors: int = 0, **counts: int) -> None:
    """Refuse settings of a page of needles: how many of what it counts, digits of a code, keys that nobody asks for."""
    for name, value in counts.items():
        require(1 <= value <= 99, f"1 <= {name} <= 99", **{name: value})
    require(0 <= distractors <= 99, "0 <= distractors <= 99", distractors=distractors)
    require(2 <= digits <= 20, "2 <= digits <= 20", digits=digits)


def asks_for(key: str) -> tuple[str, str]:
    """The question for the code of a key, and how its answer begins."""
    return f"\nQuestion: What is the code of {key} in the text above?", f"The code of {key} is"


@dataclass(frozen=True)
class Needles:
    """How many keys stand in the text, how many codes each has, how many keys are asked for."""

    keys: int
    values: int
    asked: int
    digits: int

    def draw(self, rng: random.Random) -> dict[str, list[str]]:
        """Key -> its codes; all codes differ."""
        codes = distinct_numbers(rng, self.keys * self.values, self.digits)
        keys = pairs_of_words(rng, self.keys)
        return {key: codes[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}

    def statement(self, tokenizer: Any, key: str, code: str) -> list[int]:
        one = "The code" if self.values == 1 else "One of the codes"
        return encode(tokenizer, f"\n{one} of {key} is {code}.\n")

    def asks(self, keys: Sequence[str]) -> tuple[str, str]:
        """The question, and how its answer begins."""
        if self.values * self.asked == 1:
            return asks_for(keys[0])
        all_of = f"the codes of {listing(keys)}"
        return f"\nQuestion: What are all {all_of} in the text above?", f"T{all_of[1:]} are"

    @property
    def chance(self) -> float:
        """How often one of the page's codes is a wanted one; 0 where the page has no others to take for it."""
        return 0.0 if self.asked == self.keys else self.asked / self.keys


def needle_samples(
    needles: Needles,
    name: str,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None,
    chat: bool,
) -> list[Sample]:
    """`count` prompts of exactly `length` tokens with needles at random places of running text."""
    result = []
    for i in range(count):
        rng = random.Random(f"{name} {seed} {i}")
        share = i / max(1, count - 1)
        result.append(needle_sample(needles, tokenizer, length, share, rng, source or held_out(), chat))
    return freely(tokenizer, result, NEEDLE_TOKENS)


def needle_sample(
    needles: Needles,
    tokenizer: Any,
    length: int,
    share: float,
    rng: random.Random,
    source: Source,
    chat: bool,
) -> Sample:
    """One prompt; of a single asked fact `share` says the place among the facts, of several chance does."""
    drawn = needles.draw(rng)
    facts = [(key, code) for key, codes in drawn.items() for code in codes]
    rng.shuffle(facts)
    asked = rng.sample(list(drawn), needles.asked)
    if needles.values * needles.asked == 1:
        asked = [facts[round(share * (len(facts) - 1))][0]]
    wanted = tuple(code for key in asked for code in drawn[key])
    frame = Frame.freely(tokenizer, *needles.asks(asked), chat)
    pieces = [needles.statement(tokenizer, key, code) for key, code in facts]
    body = woven(tokenizer, frame, length, rng, source, encode(tokenizer, INTRO), pieces, wanted)
    spans = tuple(span for span, (key, _) in zip(body.spans, facts, strict=True) if key in asked)
    return free_sample(frame, body, wanted, spans, needles.chance)


def free_sample(
    frame: Frame, body: Body, wanted: tuple[str, ...], spans: tuple[tuple[int, int], ...], chance: float
) -> Sample:
    """A prompt of these parts; `freely` gives it its answer once all samples of a call are known."""
    prompt = frame.around(body.ids)
    evidence = (min(first for first, _ in spans), max(past for _, past in spans))
    facts = spans if len(spans) > 1 else ()
    depth = evidence[0] / len(prompt)
    return Sample(prompt, [0], evidence, depth, chance, wanted=wanted, facts=facts)
