"""Needles under one key that has several codes; all are asked for.

    ... text ... One of the codes of quiet river is 4821937. ... One of the codes of quiet river is 9172246. ...
    ... Question: What are all the codes of quiet river in the text above?  -> 4821937, 9172246, ...

`distractors` other keys have as many codes each; without any, as in the paper, all codes of the page are wanted.
"""

from dataclasses import dataclass
from typing import Any

from regard.core import Card
from regard.kinds.task import TaskPage
from regard.tasks.base import Sample
from regard.tasks.corpus import Source
from regard.tasks.ruler import Needles, check_needles, needle_samples


@dataclass(frozen=True)
class Config:
    values: int = 4  # codes of a key
    distractors: int = 0  # other keys, with as many codes
    digits: int = 7  # of a code

    def __post_init__(self) -> None:
        check_needles(self.digits, self.distractors, values=self.values)


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
    """`count` prompts of exactly `length` tokens with several needles for each key, and one key asked for."""
    needles = Needles(1 + cfg.distractors, cfg.values, asked=1, digits=cfg.digits)
    return needle_samples(needles, "niah_multivalue", tokenizer, length, count, seed, source, chat)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"distractors": 1, "values": 2},),
    card=Card(
        title="Needles with many values",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="one key has several codes in different places of the text, and all of them are asked for",
        cost="none",
        state="as many facts as values",
        lineage=("needle",),
        caveat="generated are one and a half right answers and 8 tokens, at most the paper's 128; nothing is taken off "
        "for numbers that are wrong, so who lists every number of the page is right",
    ),
)
