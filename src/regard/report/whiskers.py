"""Means with their intervals as small drawings: a bar from 0, a whisker over it, grey for a control."""

from collections.abc import Iterable, Mapping
from typing import Any

from regard.report.words import number

Found = Mapping[str, Any]
FOR, AGAINST, CONTROL = "#d55e00", "#0072b2", "#b9b9b3"
WIDTH, HEIGHT, EDGE = 200, 18, 4


def span(rows: Iterable[Found]) -> tuple[float, float]:
    """The range that holds 0 and every number of the rows, the same for all drawings of a table."""
    known = [v for r in rows for v in (number(r.get(k)) for k in ("mean", "low", "high")) if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    return (low, high) if high > low else (0.0, 1.0)


def whisker(row: Found, ends: tuple[float, float]) -> str:
    """A bar and its whisker between the ends; without an interval only the bar, without a mean nothing.

    >>> '<path' in whisker({"mean": 0.5, "low": 0.4, "high": 0.6}, (0.0, 1.0))
    True
    """
    mean, low, high = (number(row.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return ""

    def x(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * (value - ends[0]) / (ends[1] - ends[0])

    zero, middle = x(0.0), HEIGHT / 2
    colour = CONTROL if row.get("control") else FOR if mean >= 0 else AGAINST
    left = min(zero, x(mean))
    shapes = [
        f'<rect x="{left:.1f}" y="3.5" width="{max(abs(x(mean) - zero), 0.8):.1f}" height="11" fill="{colour}"/>',
        f'<path d="M{zero:.1f} 0V{HEIGHT}" stroke="#8b8f93"/>',
    ]
    if low is not None and high is not None:
        a, b = x(low), x(high)
        line = f"M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 3.5}v7M{b:.1f} {middle - 3.5}v7"
        shapes.append(f'<path d="{line}" stroke="#23272b" stroke-width="1.3" fill="none"/>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" preserveAspectRatio="none"'
    return f'<svg class="whisker" {size} aria-hidden="true">{"".join(shapes)}</svg>'
