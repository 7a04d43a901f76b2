"""One colour and one shape per method, the same in every plot, legend and table of a page.

The colours are Okabe and Ito's, which stay apart under the common kinds of colour blindness, without yellow
(too pale on white) and with two darker ones. Neighbours differ in colour and in shape; the pairs repeat after
80 methods.
"""

import math
from collections.abc import Iterable, Mapping

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#77770a")
SHAPES = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "x",
    "pentagon",
    "cross",
    "hexagon",
    "triangle-left",
)
FULL = ("#111111", "star")
Marks = Mapping[str, tuple[str, str]]


def marks(labels: Iterable[str], full: str | None) -> dict[str, tuple[str, str]]:
    """label -> (colour, shape), by the alphabet, so that a page keeps its colours when more cells arrive."""
    others = sorted(set(labels) - {full})
    n = len(COLOURS)
    made = {label: (COLOURS[i % n], SHAPES[(i + i // n) % len(SHAPES)]) for i, label in enumerate(others)}
    return ({full: FULL} if full is not None else {}) | made


def corners(shape: str) -> list[tuple[float, float]]:
    """The outline of a shape around (0, 0), as Plotly draws it."""
    around = {
        "triangle-up": (3, 90),
        "triangle-down": (3, 270),
        "triangle-left": (3, 180),
        "diamond": (4, 90),
    }
    around |= {
        "square": (4, 45),
        "pentagon": (5, 90),
        "hexagon": (6, 90),
        "star": (10, 90),
        "x": (12, 45),
        "cross": (12, 0),
    }
    n, start = around[shape]
    out = []
    for i in range(n):
        radius, angle = 6.0, math.radians(start + 360 * i / n)
        if shape == "star":
            radius = 6.5 if i % 2 == 0 else 2.8
        if n == 12:  # four arms: two far corners each, and the inner corner between them
            arm, corner = divmod(i, 3)
            angle = math.radians(start + 90 * arm + (-20, 20, 45)[corner])
            radius = 6.2 if corner < 2 else 3.0
        out.append((radius * math.cos(angle), -radius * math.sin(angle)))
    return out


def glyph(colour: str, shape: str) -> str:
    """The mark as a small inline drawing for legend and table."""
    if shape == "circle":
        inside = f'<circle r="5" fill="{colour}"/>'
    else:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners(shape))
        inside = f'<polygon points="{points}" fill="{colour}"/>'
    return f'<svg class="mark" viewBox="-8 -8 16 16" width="14" height="14" aria-hidden="true">{inside}</svg>'
