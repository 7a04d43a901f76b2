"""Needles under several keys, all of them asked for at once.

    ... text ... The code of quiet river is 4821937. ... The code of early garden is 9172246. ...
    ... Question: What are all the codes of early garden and quiet river in the text above?  -> 9172246, 4821937

`distractors` other keys have a needle each that nobody asks for; the paper has none.
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
    queries: int = 4  # keys that are asked for
    distractors: int = 0  # keys that are not
    digits: int = 7  # of a code

    def __post_init__(self) -> None:
        check_needles(self.digits, self.distractors, queries=self.queries)


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
    """`count` prompts of exactly `length` tokens with one needle for each key, and several keys asked for."""
    needles = Needles(cfg.queries + cfg.distractors, 1, asked=cfg.queries, digits=cfg.digits)
    return needle_samples(needles, "niah_multiquery", tokenizer, length, count, seed, source, chat)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"distractors": 3, "queries": 2},),
    card=Card(
        title="Needles asked for together",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="several needles under different keys, and one question for the codes of all of them",
        cost="none",
        state="as many facts as queries",
        lineage=("needle",),
        caveat="generated are one and a half right answers and 8 tokens, at most the paper's 128. Which code is said "
        "of which key makes no difference to the score",
    ),
)
