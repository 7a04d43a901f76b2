"""POPE: is a certain object on the image? Half of the answers are "no", to objects chosen in three ways.

    random       an absent object, any
    popular      the most frequent objects of the data that are absent
    adversarial  what usually comes with those that are there, and is absent

It is asked in three questions for each split and answer; an answer is scored under four rules and by the first token's
probability. Without files of one's own it is asked about rendered scenes, whose priors are planted (tasks/scenes.py).

>>> [q.answer for q in pictures(Config(split="random"), 1, seed=0)]
['yes', 'no', 'yes', 'no', 'yes', 'no']
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.pictures import PictureQuestion, own_questions, scenes
from regard.tasks.scene_questions import exists
from regard.tasks.scenes import PAIRS, Prior, Scene, partner

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Config:
    split: str = "all"  # how absent objects are chosen in rendered scenes; "all": in each of the three ways
    # how things stand out in rendered scenes: from clear to faint, or "clear", or "faint"
    contrast: Literal["clear", "faint", "mixed"] = "mixed"
    conflict: bool = False  # scenes that break the planted priors

    def __post_init__(self) -> None:
        require(self.split in (*SPLITS, "all"), f"split is one of {(*SPLITS, 'all')}", split=self.split)


def absent(scene: Scene, split: str, rng: random.Random) -> list[tuple[str, str]]:
    """Absent objects in the order in which a split asks for them."""
    others = [pair for pair in PAIRS if pair not in scene.shapes]
    rng.shuffle(others)
    if split == "popular":
        weight = dict(zip(PAIRS, Prior().popular, strict=True))
        others.sort(key=lambda pair: -weight[pair])
    if split == "adversarial":
        usual = [partner(pair) for pair in scene.shapes]
        others.sort(key=lambda pair: pair not in usual)
    return others


def pictures(cfg: Config, count: int, seed: int, source: str | Path | None = None) -> list[PictureQuestion]:
    """Six questions on each of `count` images and for each split; of one's own, all that the file asks."""
    if source is not None:
        return own_questions(source, count)
    rng, found = random.Random(f"pope {seed}"), []
    for i, scene in enumerate(scenes(count, seed, cfg.contrast, cfg.conflict)):
        picture = scene.pixels()
        for split in SPLITS if cfg.split == "all" else (cfg.split,):
            missing = absent(scene, split, rng)
            for k in range(3):
                for pair, present in ((scene.shapes[k % len(scene.shapes)], True), (missing[k], False)):
                    asked = exists(pair, present)
                    found.append(PictureQuestion(picture, asked.text, asked.answer, f"scene {i}", split))
    return found


METHOD = TaskPage(
    config=Config,
    pictures=pictures,
    metric="yes_no",
    card=Card(
        title="POPE",
        paper="Evaluating Object Hallucination in Large Vision-Language Models",
        year=2023,
        idea="yes-no questions about objects that are there, and that are not",
        cost="one token for each question",
        needs=("vlm",),
        caveat="on rendered scenes three present objects may repeat where a scene has fewer; published files are asked "
        "as they are",
    ),
)
