"""Where full attention itself is near what guessing gives: such a cell of the grid ranks no method.

A cell is near its floor where the interval of full attention's score reaches `chance`, the score of an answer that is
guessed (the row says it; 0 where it does not). There "worse than full" is noise over noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regard.report.words import clean, number, percent

Row = Mapping[str, Any]
FLOOR = "floor"  # the status of a cell that was not measured, since full attention is near its floor there


def near_floor(low: float, chance: float) -> bool:
    """Whether a score whose interval begins at `low` may be what guessing gives."""
    return low <= chance


def at_floor(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The (task, length) at which full attention is near its floor, with its score, its lower end and the chance."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        if row["method"] == "full" and row.get("status") == "ok" and number(row.get("quality")) is not None:
            groups.setdefault((row.get("task"), row.get("length")), []).append(row)
    found = [{"task": task, "length": length, **score(seeds)} for (task, length), seeds in groups.items()]
    near = [cell for cell in found if near_floor(cell["quality_low"], cell["chance"])]
    return sorted(near, key=lambda cell: (str(cell["task"]), cell["length"]))


def score(seeds: Sequence[Row]) -> dict[str, float]:
    """Over the seeds of a cell: the mean score, its lower end (independent half widths add in squares), the chance."""
    values, n = [float(row["quality"]) for row in seeds], len(seeds)
    lows = [number(row.get("quality_low")) for row in seeds]
    below = [value - (value if low is None else low) for value, low in zip(values, lows, strict=True)]
    quality = sum(values) / n
    chance = sum(number(row.get("chance")) or 0.0 for row in seeds) / n
    return {"quality": quality, "quality_low": quality - math.hypot(*below) / n, "chance": chance}


def floor_text(cell: Row) -> str:
    """A score near its floor, in words."""
    low = percent(max(0.0, cell["quality_low"]))
    return f"{percent(cell['quality'])}, its interval down to {low}, by guessing {percent(cell['chance'])}"


def places(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{clean(cell['task'])} at length {cell['length']}" for cell in cells]


def floor_notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is left out, and by what numbers."""
    said = [f"{place} ({floor_text(cell)})" for place, cell in zip(places(cells), cells, strict=True)]
    if not said:
        return []
    return [
        f"Full attention is near what guessing gives on {'; '.join(said)}: this ranks no method, and it is left out of "
        "every mean of quality and of the sentence."
    ]
