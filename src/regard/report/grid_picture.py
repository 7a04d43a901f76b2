"""Who attends to whom on an image, as a picture: for some places the weights of all others, dark where large."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.drawn import LINE, SOFT, WIDE, Box, Words
from regard.report.pixels import ADVANCE

SHADES = " ░▒▓█"
LIGHT, DARK, ASKING = (240, 240, 236), (31, 95, 153), "#d1495b"
CELL, SIZE, PAD, GAP = 18, 16, 16, 36


@dataclass(frozen=True)
class PlaceMap:
    """The weights [rows][columns] with which the place `at` (row, column) reads all others; `label` names it."""

    label: str
    at: tuple[int, int]
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class GridPicture:
    """Maps of some places of one image, each shaded by its own largest weight, and what stands below them."""

    title: str
    maps: tuple[PlaceMap, ...]
    note: str = "dark = a large weight, of each map its own largest; the place that asks is framed"

    @property
    def sides(self) -> tuple[int, int]:
        return len(self.maps[0].weights), len(self.maps[0].weights[0])

    def facts(self) -> dict[str, Any]:
        """As data."""
        maps = [{"place": m.label, "at": list(m.at), "weights": [[round(w, 6) for w in row] for row in m.weights]}
                for m in self.maps]  # fmt: skip
        return {"drawn": self.title, "grid": list(self.sides), "maps": maps}

    def lines(self, width: int = 80) -> list[str]:
        """For a terminal: two letters for each place, the one that asks in a bracket; below, how many it reads.

        As many maps side by side as so many columns have room for.
        """
        rows, columns = self.sides
        across = max(1, (width + 3) // (2 * columns + 5))
        lines = [*textwrap.wrap(f"{self.title}; {rows} x {columns} places", min(width, 80)), ""]
        for first in range(0, len(self.maps), across):
            lines += self.row_of_maps(self.maps[first : first + across])
        note = textwrap.wrap(self.note.replace("framed", "in a bracket"), min(width, 80))
        return [line.rstrip() for line in [*lines, *note]]

    def row_of_maps(self, maps: Sequence[PlaceMap]) -> list[str]:
        rows, columns = self.sides
        wide = 2 * columns
        lines = ["   ".join(f"{m.label:<{wide + 2}}"[: wide + 2] for m in maps)]
        lines.append("   ".join(f"┌{'─' * wide}┐" for _ in maps))
        for y in range(rows):
            lines.append("   ".join(f"│{''.join(shaded(m, y, x) for x in range(columns))}│" for m in maps))
        lines.append("   ".join(f"└{'─' * wide}┘" for _ in maps))
        return [*lines, "   ".join(f"{reads(m):<{wide + 2}}" for m in maps)]

    def layout(self) -> tuple[int, int, list[Box | Words]]:
        """Width, height and what stands there: two maps in a row."""
        rows, columns = self.sides
        across = min(2, len(self.maps))
        width = max(2 * PAD + across * columns * CELL + (across - 1) * GAP, 360)
        room = int((width - 2 * PAD) / max(WIDE * SIZE, ADVANCE))
        parts: list[Box | Words] = []
        y = PAD
        for line in textwrap.wrap(f"{self.title.replace(',', ', ')}; {rows} x {columns} places", room):
            y += round(LINE * SIZE)
            parts.append(Words(PAD, y, line, SIZE))
        step = rows * CELL + 4 * SIZE
        for n, found in enumerate(self.maps):
            x, top = PAD + n % across * (columns * CELL + GAP), y + 2 * SIZE + n // across * step
            parts.append(Words(x, top - SIZE // 3, found.label, SIZE))
            parts += squares(found, x, top)
            parts.append(Words(x, top + rows * CELL + SIZE, reads(found), SIZE, SOFT))
        y += SIZE + -(-len(self.maps) // across) * step
        for line in textwrap.wrap(self.note, room):
            y += round(LINE * SIZE)
            parts.append(Words(PAD, y, line, SIZE, SOFT))
        return width, y + PAD, parts


def share(found: PlaceMap, y: int, x: int) -> float:
    """Of the largest weight of the map."""
    most = max(max(abs(w) for w in row) for row in found.weights)
    return abs(found.weights[y][x]) / most if most else 0.0


def shaded(found: PlaceMap, y: int, x: int) -> str:
    part = share(found, y, x)
    # what is read at all is seen
    shade = SHADES[0 if part == 0 else max(1, min(4, round(4 * part)))]
    return f"[{shade}"[:2] if (y, x) == found.at else 2 * shade


def reads(found: PlaceMap) -> str:
    count = sum(w != 0 for row in found.weights for w in row)
    return f"reads {count} place{'s' * (count != 1)}"


def squares(found: PlaceMap, left: int, top: int) -> list[Box]:
    parts = []
    for y, row in enumerate(found.weights):
        for x, _ in enumerate(row):
            part = share(found, y, x)
            part = 0.0 if part == 0 else 0.15 + 0.85 * part
            at = left + x * CELL, top + y * CELL
            if (y, x) == found.at:
                parts.append(Box(*at, CELL - 1, CELL - 1, ASKING))
                parts.append(Box(at[0] + 3, at[1] + 3, CELL - 7, CELL - 7, blended(part)))
            else:
                parts.append(Box(*at, CELL - 1, CELL - 1, blended(part)))
    return parts


def blended(part: float) -> str:
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(LIGHT, DARK, strict=True))
