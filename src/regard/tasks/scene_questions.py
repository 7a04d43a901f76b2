"""What is asked of a rendered scene, in words, and the right answer: one question a kind.

Every word is a token of its own; the letters of a printed word are answered one by one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from regard.tasks.scenes import COLOURS, DIGITS, LETTERS, PAIRS, SHAPES, Scene

DESCRIBE = "describe the image ."
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
SPOKEN = (
    "is", "there", "a", "?", "yes", "no", "describe", "the", "image", ".", "and", "how", "many", "what", "word",
    "digit", "colour", "where", "top", "bottom", "left", "right",
    *SHAPES, *PLURALS.values(), *COLOURS, *DIGITS, *LETTERS,
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def exists(pair: tuple[str, str], present: bool) -> Question:
    return Question("exists", f"is there a {pair[0]} {pair[1]} ?", "yes" if present else "no")


def asked_exists(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.5
    pool = scene.shapes if present else [p for p in PAIRS if p not in scene.shapes]
    return exists(rng.choice(pool), present)


def asked_describe(scene: Scene, rng: random.Random) -> Question:
    return Question("describe", DESCRIBE, scene.caption)


def asked_count(scene: Scene, rng: random.Random) -> Question:
    """Of a shape that is there, most of the time."""
    names = [name for _, name in scene.shapes]
    shape = rng.choice(names) if rng.random() < 0.8 else rng.choice(SHAPES)
    return Question("count", f"how many {PLURALS[shape]} ?", str(names.count(shape)))


def asked_word(scene: Scene, rng: random.Random) -> Question | None:
    return next((Question("word", "what word is there ?", " ".join(t.name)) for t in scene.of("word")), None)


def asked_digit(scene: Scene, rng: random.Random) -> Question | None:
    return next((Question("digit", "what digit is there ?", t.name) for t in scene.of("digit")), None)


def asked_colour(scene: Scene, rng: random.Random) -> Question | None:
    """Of the digit, which the question names: its usual colour is a good guess."""
    found = scene.of("digit")
    return Question("colour", f"what colour is the {found[0].name} ?", found[0].colour) if found else None


def asked_where(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.of("shape"))
    return Question("where", f"where is the {thing.colour} {thing.name} ?", " ".join(thing.place))


ASKED: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "exists": asked_exists, "describe": asked_describe, "count": asked_count, "word": asked_word,
    "digit": asked_digit, "colour": asked_colour, "where": asked_where,
}  # fmt: skip
