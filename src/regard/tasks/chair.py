"""CHAIR: what a caption names that is not on the image, with what it leaves out, and how long it is.

    CHAIR_I = mentions of absent objects / mentions of objects        (tasks/chair_scores.py)

Without files of one's own, captions of rendered scenes with planted priors; `conflict` scenes break them.

>>> question = pictures(Config(), 1, seed=0)[0]
>>> question.text
'describe the image .'
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from regard.core import Card
from regard.kinds.task import TaskPage
from regard.tasks.pictures import PictureQuestion, own_questions, scenes
from regard.tasks.scene_questions import DESCRIBE


@dataclass(frozen=True)
class Config:
    # how things stand out in rendered scenes: from clear to faint, or "clear", or "faint"
    contrast: Literal["clear", "faint", "mixed"] = "mixed"
    conflict: bool = False  # scenes that break the planted priors
    instruction: str = "Please describe this image in detail."  # for images of one's own


def pictures(cfg: Config, count: int, seed: int, source: str | Path | None = None) -> list[PictureQuestion]:
    if source is not None:
        return [q if q.text else replace(q, text=cfg.instruction) for q in own_questions(source, count)]
    return [
        PictureQuestion(
            scene.pixels(), DESCRIBE, "", f"scene {i}", objects=tuple(" ".join(p) for p in scene.shapes)
        )
        for i, scene in enumerate(scenes(count, seed, cfg.contrast, cfg.conflict))
    ]


METHOD = TaskPage(
    config=Config,
    pictures=pictures,
    metric="chair",
    card=Card(
        title="CHAIR",
        paper="Object Hallucination in Image Captioning",
        year=2018,
        idea="objects that captions name and images do not show",
        cost="a caption for each image",
        needs=("vlm",),
        caveat="objects of one's own are those of the annotations, by their words and plurals; COCO's list of synonyms "
        "is not shipped",
    ),
)
