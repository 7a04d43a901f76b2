"""What the pages after Mind Your Step share: a choice of two words, said at once or after some thinking; grammars.

A choice is generated freely and looked for as a text. Said at once, the reply is begun for the model and its next word
counts; after thinking, so many tokens are generated and the sentence that the question asks for counts.
"""

import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from regard.core import require
from regard.tasks.base import Frame, Sample, check_writes, continuation, encode, even
from regard.tasks.corpus import Source

LETTERS = "MRTVX"  # of the strings
MOST_TRIES = 1000
THINKS = "Let us think step by step."


@dataclass(frozen=True)
class Choice:
    """A question that is answered by one of two words, neither of which is a part of the other."""

    question: str
    begins: str  # the answer up to the word
    words: tuple[str, str]
    thinking: int = 0  # tokens that the model writes before it answers

    def frame(self, tokenizer: Any, chat: bool) -> Frame:
        if not self.thinking:
            return Frame.freely(tokenizer, self.question, self.begins, chat)
        ends = " or ".join(f'"So {self.begins[0].lower()}{self.begins[1:]} {word}."' for word in self.words)
        return Frame.freely(tokenizer, f"{self.question} Think first, then end with {ends}", THINKS, chat)

    def wanted(self, word: str) -> tuple[str]:
        return (f"so {self.begins.lower()} {word}" if self.thinking else word,)

    def sample(
        self, tokenizer: Any, length: int, text: str, word: str, rng: random.Random, source: Source, chat: bool
    ) -> Sample:  # fmt: skip
        """A prompt of exactly `length` tokens: running text, `text`, the question."""
        frame, ids = self.frame(tokenizer, chat), encode(tokenizer, text)
        filler = source.take(tokenizer, frame.room(length, len(ids)), rng)
        return Sample(frame.around(filler + ids), [0], (0, 0), chance=0.5, wanted=self.wanted(word))

    def answered(self, tokenizer: Any, samples: list[Sample]) -> list[Sample]:
        """The same samples, each with room for thinking and for the longer of both words."""
        for word in self.words:
            check_writes(tokenizer, word)
        right = [continuation(tokenizer, self.begins, f" {word}.") for word in self.words]
        count = max(map(len, right)) + (self.thinking and self.thinking + len(encode(tokenizer, self.begins)))
        return even([replace(s, answer=(right[0] * count)[:count]) for s in samples])


@dataclass(frozen=True)
class Grammar:
    """A finite automaton: edges[state] maps a letter to the next state; a path begins in 0 and may end in `final`.

    >>> Grammar(({"M": 1, "T": 0}, {"X": 0}), final=(1,)).strings(1, 3)
    ['M', 'MXM', 'TM', 'TTM']
    """

    edges: tuple[dict[str, int], ...]
    final: tuple[int, ...]

    def accepts(self, text: str) -> bool:
        state: int | None = 0
        for letter in text:
            state = None if state is None else self.edges[state].get(letter)
        return state in self.final

    def strings(self, least: int, most: int) -> list[str]:
        """All strings of these lengths, sorted."""
        paths, found = {"": 0}, []
        for n in range(1, most + 1):
            steps = ((text, *edge) for text, state in paths.items() for edge in self.edges[state].items())
            paths = {text + letter: to for text, letter, to in steps}
            found += [text for text, state in paths.items() if n >= least and state in self.final]
        return sorted(found)

    @cached_property
    def letters(self) -> str:
        return "".join(sorted({letter for edges in self.edges for letter in edges}))

    def spoiled(self, text: str, rng: random.Random) -> str | None:
        """The text with one letter changed so that no path gives it; None where every change is a string again."""
        changes = [
            text[:i] + letter + text[i + 1 :]
            for i, letter in product(range(len(text)), self.letters)
            if letter != text[i]
        ]
        wrong = [change for change in changes if not self.accepts(change)]
        return rng.choice(wrong) if wrong else None


def random_grammar(
    rng: random.Random, states: int = 6, at_least: int = 40, least: int = 4, most: int = 8
) -> Grammar:
    """Two ways out of each state, all states on a path from the first to the last, enough strings of these lengths."""
    require(2 <= states <= 20, "2 <= states <= 20", states=states)
    for _ in range(MOST_TRIES):
        edges = tuple({a: rng.randrange(states) for a in rng.sample(LETTERS, 2)} for _ in range(states))
        grammar = Grammar(edges, (states - 1,))
        if _whole(grammar) and len(grammar.strings(least, most)) >= at_least:
            return grammar
    raise ValueError(
        f"a grammar of {states} states with {at_least} strings of {least} to {most} letters in 1000 draws"
    )


def _whole(grammar: Grammar) -> bool:
    """Whether every state is reached from the first and reaches the last."""
    states = range(len(grammar.edges))
    reach = [{i, *grammar.edges[i].values()} for i in states]
    for _ in states:
        reach = [set().union(*(reach[j] for j in one)) for one in reach]
    return len(reach[0]) == len(states) and all(grammar.final[0] in one for one in reach)
