"""Rendered scenes of 32 x 32 pixels: coloured shapes, digits and printed words, drawn from a seed.

A scene has 4 x 4 cells of 8 x 8 pixels. A thing takes one cell, a word three beside each other. Two priors are planted:
of 16 coloured shapes, number i comes with `partner(i)` (`Prior.together` of the time), and each digit has its usual
colour (`Prior.coloured`). `conflicting` scenes break both: no partner is there, no digit has its usual colour.

Things differ in contrast: at `CLEAR` they are plain to see, at `FAINT` they hardly stand out of the noise.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from regard.core import require
from regard.core.errors import NotInstalled

SIDE, CELL = 32, 8
GRID = SIDE // CELL
SHAPES, COLOURS = ("circle", "square", "triangle", "cross"), ("red", "green", "blue", "yellow")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
DIGITS = tuple("0123456789")
LETTERS = tuple("bdegilmnorst")
RGB = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.2, 0.3, 1.0), "yellow": (0.95, 0.9, 0.1)}
WHITE = (1.0, 1.0, 1.0)
CLEAR, FAINT = (0.9,), (0.2, 0.12)
MIXED = (0.9, 0.9, 0.35, 0.2, 0.12)
NOISE = 0.5
# 5 x 7 letters, a number for each row, its highest bit on the left
GLYPHS = {
    "b": (30, 17, 17, 30, 17, 17, 30), "d": (30, 17, 17, 17, 17, 17, 30), "e": (31, 16, 16, 30, 16, 16, 31),
    "g": (14, 17, 16, 23, 17, 17, 15), "i": (14, 4, 4, 4, 4, 4, 14), "l": (16, 16, 16, 16, 16, 16, 31),
    "m": (17, 27, 21, 21, 17, 17, 17), "n": (17, 25, 21, 19, 17, 17, 17), "o": (14, 17, 17, 17, 17, 17, 14),
    "r": (30, 17, 17, 30, 20, 18, 17), "s": (15, 16, 16, 14, 1, 1, 30), "t": (31, 4, 4, 4, 4, 4, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Prior:
    """How often what usually goes together does. popular: weights of the 16 shapes, in proportion."""

    together: float = 0.93
    coloured: float = 0.9
    popular: tuple[float, ...] = tuple(1 / (1 + i // 4) for i in range(16))


@dataclass(frozen=True)
class Thing:
    """What is in a cell (row-major number): kind "shape", "digit" or "word", its name, its colour, its contrast."""

    kind: str
    name: str
    colour: str
    cell: int
    contrast: float = 0.9

    @property
    def words(self) -> str:
        """As a caption names it."""
        return f"a {self.colour} {self.name}"

    @property
    def place(self) -> tuple[str, str]:
        row, column = divmod(self.cell, GRID)
        return ("top", "bottom")[row >= GRID // 2], ("left", "right")[column >= GRID // 2]


@dataclass(frozen=True)
class Scene:
    """Things in the order of their cells, and the noise behind them, a seed."""

    things: tuple[Thing, ...]
    noise: int

    def of(self, kind: str) -> list[Thing]:
        return [t for t in self.things if t.kind == kind]

    @property
    def shapes(self) -> list[tuple[str, str]]:
        return [(t.colour, t.name) for t in self.of("shape")]

    @property
    def caption(self) -> str:
        return " and ".join(t.words for t in self.things if t.kind != "word")

    def pixels(self) -> np.ndarray:
        """[32, 32, 3] of uint8."""
        image = np.random.default_rng(self.noise).random((SIDE, SIDE, 3), dtype=np.float32) * NOISE
        for thing in self.things:
            colour = np.asarray(RGB.get(thing.colour, WHITE), dtype=np.float32)
            for cell, picture in drawn(thing):
                r, c = (CELL * x for x in divmod(cell, GRID))
                share = thing.contrast * picture[..., None]
                image[r : r + CELL, c : c + CELL] *= 1 - share
                image[r : r + CELL, c : c + CELL] += share * colour
        return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def partner(pair: tuple[str, str]) -> tuple[str, str]:
    """The coloured shape that this one usually comes with."""
    return PAIRS[(PAIRS.index(pair) + 5) % len(PAIRS)]


def usual_colour(digit: str) -> str:
    return COLOURS[int(digit) % len(COLOURS)]


def drawn(thing: Thing) -> list[tuple[int, np.ndarray]]:
    """(cell, picture [8, 8] in 0 .. 1) of all cells that a thing takes."""
    if thing.kind == "word":
        return [(thing.cell + i, letter(x)) for i, x in enumerate(thing.name)]
    if thing.kind == "digit":
        kept = handwritten()[thing.name]
        return [(thing.cell, kept[thing.cell * 7 % len(kept)])]
    return [(thing.cell, shape(thing.name))]


@cache
def shape(name: str) -> np.ndarray:
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    return {
        "circle": x**2 + y**2 < 10.5,
        "square": (abs(x) < 2.8) & (abs(y) < 2.8),
        "triangle": (y > -3) & (y < 3) & (abs(x) < (y + 3.2) / 2),
        "cross": ((abs(x) < 1.2) | (abs(y) < 1.2)) & (abs(x) < 3.6) & (abs(y) < 3.6),
    }[name].astype(np.float32)


@cache
def letter(name: str) -> np.ndarray:
    picture = np.zeros((CELL, CELL), dtype=np.float32)
    for y, row in enumerate(GLYPHS[name]):
        picture[y, 1:6] = [row >> (4 - x) & 1 for x in range(5)]
    return picture


@cache
def handwritten() -> dict[str, list[np.ndarray]]:
    """scikit-learn's handwritten digits, 8 x 8, by name."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NotInstalled("the digits of scenes are scikit-learn's: pip install scikit-learn") from error
    data = load_digits()
    pictures = (data.images / 16).astype(np.float32)
    return {d: [p for p, t in zip(pictures, data.target) if str(t) == d] for d in DIGITS}


@dataclass
class Scenes:
    """Scenes drawn one after another from a seed.

    conflict  partners are absent and colours of digits unusual; else both follow `prior`
    contrast  of each thing one of these
    """

    seed: int | str
    conflict: bool = False
    contrast: Sequence[float] = MIXED
    prior: Prior = field(default_factory=Prior)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"scenes {self.seed}")

    def draw(self) -> Scene:
        rng = self.rng
        pairs = self.pairs(rng.randint(1, 2))
        word = "".join(rng.sample(LETTERS, 3)) if rng.random() < 0.5 else ""
        digit = rng.choice(DIGITS) if rng.random() < 0.4 else ""
        taken, things = set(), []
        if word:
            cell = rng.randrange(GRID) * GRID + rng.randrange(GRID - 2)
            taken = {cell, cell + 1, cell + 2}
            things.append(Thing("word", word, "white", cell, rng.choice(self.contrast)))
        cells = rng.sample([c for c in range(GRID**2) if c not in taken], len(pairs) + bool(digit))
        for (colour, name), cell in zip(pairs, cells):
            things.append(Thing("shape", name, colour, cell, rng.choice(self.contrast)))
        if digit:
            things.append(
                Thing("digit", digit, self.digit_colour(digit), cells[-1], rng.choice(self.contrast))
            )
        return Scene(tuple(sorted(things, key=lambda t: t.cell)), rng.randrange(2**31))

    def pairs(self, first: int) -> list[tuple[str, str]]:
        """Coloured shapes, each with its partner, or none with it."""
        found: list[tuple[str, str]] = []
        while first:
            pair = self.rng.choices(PAIRS, self.prior.popular)[0]
            clash = self.conflict and any(partner(p) == pair or partner(pair) == p for p in found)
            if pair in found or clash:
                continue
            found.append(pair)
            first -= 1
            if not self.conflict and self.rng.random() < self.prior.together and partner(pair) not in found:
                found.append(partner(pair))
        return found

    def digit_colour(self, digit: str) -> str:
        usual = usual_colour(digit)
        others = [c for c in COLOURS if c != usual]
        if self.conflict:
            return self.rng.choice(others)
        return usual if self.rng.random() < self.prior.coloured else self.rng.choice(others)

    def many(self, count: int) -> list[Scene]:
        require(count > 0, "count > 0", count=count)
        return [self.draw() for _ in range(count)]
