"""Artificial grammar: strings that follow rules which nobody says; does a new string follow them?

    Strings: MTXV, TTVRX, ...     -> Question: Does RTVX follow the rules? ...     The string follows / breaks

Strings are paths through a random automaton, a new one for each question. One that breaks the rules has one letter
changed, anywhere. People judge better by feeling than by stated reasons, and so do language models: `thinking=200`
lets the model write so many tokens before it answers. The largest loss that the paper reports is 36.3 points of
accuracy, of o1-preview against GPT-4o.

>>> grammar, told, asked = draw(Config(examples=4), random.Random("one"), follows=False)
>>> len({*told}), all(map(grammar.accepts, told)), grammar.accepts(asked), len(asked) in range(4, 9)
(4, True, False, True)
"""

import random
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Sample
from regard.tasks.corpus import Source, held_out
from regard.tasks.deliberation import Choice, Grammar, random_grammar

LEAST, MOST = 4, 8  # letters of a string
WORDS = ("follows", "breaks")
INTRO = "\nThese strings of letters follow the same rules: "


@dataclass(frozen=True)
class Config:
    examples: int = 15  # strings that are shown, all of which follow the rules
    states: int = 6  # of the automaton
    thinking: int = 0  # tokens written before the answer; 0: answered at once

    def __post_init__(self) -> None:
        require(2 <= self.examples <= 60, "2 <= examples <= 60", examples=self.examples)
        require(3 <= self.states <= 10, "3 <= states <= 10", states=self.states)
        require(0 <= self.thinking <= 4096, "0 <= thinking <= 4096", thinking=self.thinking)


def draw(cfg: Config, rng: random.Random, follows: bool) -> tuple[Grammar, list[str], str]:
    """A grammar, different strings of it, and one that is asked about."""
    grammar = random_grammar(rng, cfg.states, 2 * cfg.examples + 10, LEAST, MOST)
    *told, asked = rng.sample(grammar.strings(LEAST, MOST), cfg.examples + 1)
    spoiled = asked if follows else grammar.spoiled(asked, rng)
    return draw(cfg, rng, follows) if spoiled is None else (grammar, told, spoiled)


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
    """`count` prompts of exactly `length` tokens: running text, strings, a question; every other one breaks them."""
    drawn = []
    for i in range(count):
        rng = random.Random(f"artificial_grammar {seed} {i}")
        _, told, asked = draw(cfg, rng, follows=i % 2 == 0)
        choice, text = asks(asked, cfg), f"{INTRO}{', '.join(told)}."
        drawn.append(choice.sample(tokenizer, length, text, WORDS[i % 2], rng, source or held_out(), chat))
    return asks("", cfg).answered(tokenizer, drawn)


def asks(string: str, cfg: Config) -> Choice:
    question = (
        f"The next string is {string}. Does it follow these rules, or is there a letter that breaks them?"
    )
    return Choice(f"\nQuestion: {question}", "The string", WORDS, cfg.thinking)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    patterns=("causal_self",),
    test_settings=({"thinking": 40, "examples": 8},),
    card=Card(
        title="Artificial grammar",
        paper="Mind Your Step (by Step): Chain-of-Thought can Reduce Performance on Tasks where Thinking Makes Humans "
        "Worse",
        year=2024,
        idea="strings of a hidden automaton are shown; is another one of them? said at once or after thinking",
        cost="none",
        state="the strings",
        caveat="automata, wording and the two words of the answer are this library's own. What counts is the answer's "
        "word, or after thinking the sentence that ends it: a model that writes both sentences counts as right. The "
        "paper's faces need a model that sees and are left out",
    ),
)
