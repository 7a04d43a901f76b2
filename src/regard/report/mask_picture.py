"""A mask as a picture: small squares of queries by keys, in the terminal, as SVG and as PNG.

One layout of rectangles and words serves both kinds of file (`drawn.py`).
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.report.drawn import LINE, SOFT, WIDE, Box, Words
from regard.report.pixels import ADVANCE

SEEN, EMPTY = "#1f5f99", "#f0f0ec"
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
TWO_IN = {"initial_indent": "  ", "subsequent_indent": "  "}
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"

Grid = Sequence[Sequence[bool]]


@dataclass(frozen=True)
class MaskPicture:
    """What is drawn.

    title   what it is, and under which settings
    grids   [n][n] booleans of each head that is drawn, rows are queries
    heads   how many heads the mask has, of which the first are drawn; 1: it is the same for all
    filled  what a filled square says
    labels  role -> label of each token, written above the columns
    """

    title: str
    grids: tuple[Grid, ...]
    heads: int = 1
    labels: dict[str, list[int]] = field(default_factory=dict)
    filled: str = "filled = the query sees the key"

    @property
    def tokens(self) -> int:
        return len(self.grids[0])

    def seen(self, head: int) -> list[int]:
        """How many keys each query sees."""
        return [sum(row) for row in self.grids[head]]

    def facts(self) -> dict[str, Any]:
        """As data: the grids as lines of 1 and 0, a line for each query."""
        lines = [["".join("01"[bool(sees)] for sees in row) for row in grid] for grid in self.grids]
        keys = [self.seen(head) for head in range(len(self.grids))]
        return {
            "drawn": self.title,
            "heads": self.heads,
            "labels": self.labels,
            "sees": lines,
            "keys_seen": keys,
        }

    def layout(self) -> tuple[int, int, list[Box | Words]]:
        return layout(self)

    def lines(self, width: int = 80) -> list[str]:
        """For a terminal of so many columns."""
        return terminal_lines(self, width)

    def head_name(self, head: int) -> str:
        return f"head {head}" if self.heads > 1 else "every head"

    def legend(self) -> Iterator[str]:
        yield f"row = query, column = key; {self.filled}"
        if len(self.grids) < self.heads:
            yield f"the first {len(self.grids)} of {self.heads} heads"
        if self.labels:
            yield f"above the columns, from the top: the labels of {', '.join(self.labels)}"


def letter(label: int) -> str:
    """A label in one column: none is a dot, and numbers go on with letters."""
    return "." if label < 0 else LETTERS[label % len(LETTERS)]


# in the terminal


def terminal_lines(picture: MaskPicture, width: int = 80) -> list[str]:
    """Two queries in a line, as many heads side by side as there is room for; how many keys each query sees."""
    n, heads = picture.tokens, range(len(picture.grids))
    across = max(1, (width + 1) // (n + 3))
    lines = [*textwrap.wrap(f"{picture.title}; {n} tokens", min(width, 80)), ""]
    for first in heads[::across]:
        lines += row_of_heads(picture, heads[first : first + across])
    for line in picture.legend():
        lines += textwrap.wrap(line, min(width, 80))
    for head in heads:
        lines.append(f"keys seen by each query, {picture.head_name(head)}:")
        lines += textwrap.wrap(" ".join(map(str, picture.seen(head))), width, **TWO_IN)
    return [line.rstrip() for line in lines]


def row_of_heads(picture: MaskPicture, heads: range) -> list[str]:
    n, lines = picture.tokens, []
    rule = "─" * n
    if picture.heads > 1:
        lines.append(" ".join(f" {picture.head_name(head):<{n}} " for head in heads))
    for labels in picture.labels.values():
        lines.append(" ".join(f" {''.join(map(letter, labels))} " for _ in heads))
    lines.append(" ".join(f"┌{rule}┐" for _ in heads))
    for i in range(0, n, 2):
        lines.append(" ".join(f"│{halves(picture.grids[head][i : i + 2])}│" for head in heads))
    return [*lines, " ".join(f"└{rule}┘" for _ in heads)]


def halves(rows: Grid) -> str:
    """One line of text of two rows, or of a last row alone."""
    lower = rows[1] if len(rows) > 1 else [False] * len(rows[0])
    return "".join(HALVES[bool(a), bool(b)] for a, b in zip(rows[0], lower, strict=True))


# as a file


def layout(picture: MaskPicture) -> tuple[int, int, list[Box | Words]]:
    """Width, height and what stands there: one head large, more of them two in a row."""
    alone = len(picture.grids) == 1
    cell, size, left, right, pad = (20, 16, 44, 52, 16) if alone else (18, 20, 44, 48, 16)
    n, columns = picture.tokens, 1 if alone else 2
    panel = left + n * cell + right
    width = 2 * pad + columns * panel
    room = int((width - 2 * pad) / max(WIDE * size, ADVANCE))
    parts: list[Box | Words] = []
    y = pad
    for line in textwrap.wrap(f"{picture.title.replace(',', ', ')}; {n} tokens", room):
        y += round(LINE * size)
        parts.append(Words(pad, y, line, size))
    top, above = y + size // 2, (len(picture.labels) + 2) * round(1.2 * size)
    for at in range(len(picture.grids)):
        x, down = pad + at % columns * panel + left, top + at // columns * (above + n * cell + size) + above
        parts += panel_parts(picture, at, x, down, cell, size)
    rows = -(-len(picture.grids) // columns)
    y = top + rows * (above + n * cell + size)
    notes = [*picture.legend(), "right of a row: how many keys its query sees"]
    for line in (part for note in notes for part in textwrap.wrap(note, room)):
        y += round(LINE * size)
        parts.append(Words(pad, y, line, size, SOFT))
    return width, y + pad, parts


def panel_parts(
    picture: MaskPicture, head: int, x: int, y: int, cell: int, size: int
) -> Iterator[Box | Words]:
    """One head, its first cell at (x, y); numbers stand at every row or column for which there is room."""
    n, line = picture.tokens, round(1.2 * size)
    gap, middle = max(1, cell // 10), (cell + round(0.7 * size)) // 2
    names = len(picture.labels) + 1
    if picture.heads > 1:
        yield Words(x, y - names * line - size // 3, picture.head_name(head), size)
    for k, labels in enumerate(picture.labels.values()):
        for j, label in enumerate(labels):
            shift = (cell - round(WIDE * 16)) // 2
            yield Words(
                x + j * cell + shift, y - (names - k) * line + line - size // 3, letter(label), 16, SOFT
            )
    every = 8 if n > 16 else 4
    for i in range(0, n, every):
        yield Words(x + i * cell, y - size // 3, str(i), size, SOFT)
        yield Words(x - 6, y + i * cell + middle, str(i), size, SOFT, end=True)
    step = -(-round(1.1 * size) // cell)
    for i, (row, count) in enumerate(zip(picture.grids[head], picture.seen(head), strict=True)):
        for j, sees in enumerate(row):
            yield Box(x + j * cell, y + i * cell, cell - gap, cell - gap, SEEN if sees else EMPTY)
        if i % step == 0:
            yield Words(x + n * cell + 6, y + i * cell + middle, str(count), size)
