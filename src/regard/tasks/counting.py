"""Counting: how many of a shape are there. Asked about rendered scenes, or about images of one's own.

>>> pictures(Config(), 1, seed=0)[0].text.startswith("how many circles")
True
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regard.core import Card
from regard.kinds.task import TaskPage
from regard.tasks.pictures import PictureQuestion, asked_of_scenes, own_questions


@dataclass(frozen=True)
class Config:
    # how things stand out in rendered scenes; "mixed": clear to faint
    contrast: Literal["clear", "faint", "mixed"] = "clear"


def pictures(cfg: Config, count: int, seed: int, source: str | Path | None = None) -> list[PictureQuestion]:
    """One question on each of `count` images; of one's own, all that the file asks."""
    if source is not None:
        return own_questions(source, count)
    return asked_of_scenes("count", "shape", "counting", count, seed, cfg.contrast)


METHOD = TaskPage(
    config=Config,
    pictures=pictures,
    metric="said",
    card=Card(
        title="Counting",
        paper="regard",
        year=2026,
        idea="how many of a shape are there",
        cost="a few tokens for each question",
        needs=("vlm",),
    ),
)
