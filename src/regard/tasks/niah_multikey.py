"""Needles under many keys, one asked for: the others are distractors of the same form.

    ... text ... The code of quiet river is 4821937. ... The code of early garden is 9172246. ...
    ... Question: What is the code of quiet river in the text above?  Answer: The code of quiet river is   -> 4821937

`haystack="needles"` puts as many needles into the prompt as it has room for, in the place of running text; with
`keys=1` it is a single needle, with an answer that is generated freely. The asked needle goes down evenly through the
order of needles, from sample to sample.
"""

from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, encode
from regard.tasks.corpus import Source
from regard.tasks.ruler import INTRO, Needles, check_needles, needle_samples

HAYSTACKS = ("text", "needles")
MOST = 400  # keys take two words each, of 1,200


@dataclass(frozen=True)
class Config:
    keys: int = 4  # in running text
    digits: int = 7  # of a code
    haystack: str = "text"  # or "needles": as many as fit

    def __post_init__(self) -> None:
        check_needles(self.digits, keys=self.keys)
        require(self.haystack in HAYSTACKS, f"haystack is one of {HAYSTACKS}", haystack=self.haystack)


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
    """`count` prompts of exactly `length` tokens with one needle for each key, and one key asked for."""
    keys = cfg.keys if cfg.haystack == "text" else room_for(cfg, tokenizer, length, chat)
    needles = Needles(keys, values=1, asked=1, digits=cfg.digits)
    return needle_samples(
        needles, f"niah_multikey {cfg.haystack}", tokenizer, length, count, seed, source, chat
    )


def room_for(cfg: Config, tokenizer: Any, length: int, chat: bool) -> int:
    """So many needles that a prompt has room for them, whatever words their keys are; a tenth stays running text."""
    needles, key = Needles(1, 1, 1, cfg.digits), "available documents"
    frame = Frame.freely(tokenizer, *needles.asks([key]), chat)
    room = 0.9 * frame.room(length, len(encode(tokenizer, INTRO)))
    return max(2, min(MOST, int(room / len(needles.statement(tokenizer, key, "7" * cfg.digits)))))


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"haystack": "needles"}, {"keys": 1}),
    card=Card(
        title="Needles under many keys",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="one needle is asked for among others of the same form under other keys",
        cost="none",
        state="as many facts as keys",
        lineage=("needle",),
        caveat="keys are two words, codes seven digits as in the paper, the text is the user's or this library's. "
        "Generated are one and a half right answers and 8 tokens, at most the paper's 128",
    ),
)
