"""What tasks of images are made of: questions about pictures, from rendered scenes or from files of one's own.

One's own are a folder with a JSONL file: a line an answer is wanted for, `{"image": "a.png", "question": "...",
"answer": "yes"}`, with `"objects": ["dog", ...]` for captions. POPE's published files are read as they are
(`{"question_id": 1, "image": "...", "text": "Is there a dog in the image?", "label": "no"}`), and COCO's
instances_val2014.json for captions.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regard.core import require
from regard.core.errors import NotInstalled
from regard.tasks.scene_questions import ASKED
from regard.tasks.scenes import CLEAR, FAINT, MIXED, Scene, Scenes

CONTRASTS = {"clear": CLEAR, "faint": FAINT, "mixed": MIXED}
FORMS = (
    "lines of image, question (or text) and answer (or label), or of image and objects; or COCO's instances"
)


@dataclass(frozen=True, eq=False)
class PictureQuestion:
    """A question about a picture.

    picture  pixels [H, W, 3] of uint8, or the file; `image` names it: questions of one image are resampled together
    answer   the right one; of captions ""          objects  what is on the image, as captions are scored by it
    group    a part of the task that is scored apart too, such as POPE's splits
    """

    picture: Any
    text: str
    answer: str
    image: str
    group: str = ""
    objects: tuple[str, ...] = ()


def opened(picture: Any) -> Any:
    """Pixels, or the pillow image of a file; what cannot be read is an error that names it."""
    if isinstance(picture, np.ndarray):
        return picture
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise NotInstalled("an image is read by pillow: pip install pillow") from error
    path = Path(picture)
    require(path.exists(), "the image is there", image=str(path))
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the image can be read: {path}: {error}") from error


def scenes(count: int, seed: int, contrast: str, conflict: bool, needs: str = "") -> list[Scene]:
    """So many scenes; `needs`: each has a thing of this kind."""
    require(contrast in CONTRASTS, f"contrast is one of {tuple(CONTRASTS)}", contrast=contrast)
    drawn, found = Scenes(f"task {seed}", conflict, CONTRASTS[contrast]), []
    while len(found) < count:
        scene = drawn.draw()
        if not needs or scene.of(needs):
            found.append(scene)
    return found


def asked_of_scenes(
    kind: str, needs: str, name: str, count: int, seed: int, contrast: str
) -> list[PictureQuestion]:
    """One question of a kind on each of `count` scenes that have what it needs; `name` the task that draws it."""
    rng, found = random.Random(f"{name} {seed}"), []
    for i, scene in enumerate(scenes(count, seed, contrast, False, needs)):
        asked = ASKED[kind](scene, rng)
        assert asked is not None, "the scene has what is asked for"
        found.append(PictureQuestion(scene.pixels(), asked.text, asked.answer, f"scene {i}"))
    return found


def own_questions(source: str | Path, count: int) -> list[PictureQuestion]:
    """Questions of one's own on the first `count` images: a JSONL file, or a folder that holds one."""
    path = Path(source)
    require(path.exists(), "annotations are there", annotations=str(path))
    if path.is_dir():
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.json")])
        require(len(files) == 1, "a folder with one file of annotations", folder=str(path), files=len(files))
        path = files[0]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and not text.lstrip().startswith('{"question'):
        return coco_captions(json.loads(text), path.parent, count)
    lines = [line for line in text.split("\n") if line.strip()]
    return within([line_question(line, number, path) for number, line in enumerate(lines, 1)], count)


def line_question(line: str, number: int, path: Path) -> PictureQuestion:
    where = f"{path.name}, line {number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"annotations are JSON, one line each: {where}: {error}") from error
    require(isinstance(entry, dict) and "image" in entry, f"annotations are {FORMS}", at=where)
    question, answer = (entry.get(a, entry.get(b)) for a, b in (("question", "text"), ("answer", "label")))
    objects = entry.get("objects")
    known = (question is not None and answer is not None) or objects is not None
    require(known, f"annotations are {FORMS}", at=where, keys=sorted(entry))
    return PictureQuestion(
        picture=path.parent / str(entry["image"]), text=str(question or ""), answer=str(answer or ""),
        image=str(entry["image"]), group=str(entry.get("group", "")), objects=tuple(map(str, objects or ())),
    )  # fmt: skip


def coco_captions(data: Any, folder: Path, count: int) -> list[PictureQuestion]:
    """COCO's instances: the objects of each image by the names of their categories."""
    known = isinstance(data, dict) and {"images", "annotations", "categories"} <= set(data)
    require(
        known,
        f"annotations are {FORMS}",
        keys=sorted(data)[:8] if isinstance(data, dict) else type(data).__name__,
    )
    names = {c["id"]: c["name"] for c in data["categories"]}
    there: dict[int, list[str]] = {}
    for annotation in data["annotations"]:
        there.setdefault(annotation["image_id"], []).append(names[annotation["category_id"]])
    images = [image for image in data["images"] if image["id"] in there]
    found = [
        PictureQuestion(
            folder / image["file_name"], "", "", image["file_name"],
            objects=tuple(dict.fromkeys(there[image["id"]])),
        )
        for image in images
    ]  # fmt: skip
    return within(found, count)


def within(questions: Sequence[PictureQuestion], count: int) -> list[PictureQuestion]:
    """All questions on the first `count` images."""
    images = list(dict.fromkeys(q.image for q in questions))[:count]
    return [q for q in questions if q.image in {*images}]
