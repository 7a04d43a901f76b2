"""Grids on which pages are asked their laws: small, square where there are many places, fitting the settings."""

from typing import Any

from regard.core.grid import OnGrid

SQUARE = 20  # places from which on a grid is no line


class NotApplicable(Exception):
    """A law that this mechanism cannot be asked. The message says why."""


def grid_for(on: OnGrid, cfg: Any, n: int) -> tuple[int, ...]:
    """Sides of the smallest grid of n places or more that these settings go with; of equal ones the squarest.

    A line of few places is a grid too; of many, no side is more than eight times another.
    """
    axes = 2 if 2 in on.axes else on.axes[0]
    if n == 0:
        return (0,) * axes
    for places in range(n, 40 * n + 400):
        for sides in shapes_of(places, axes):
            if places >= SQUARE and max(sides) > 8 * min(sides) and axes > 1:
                continue
            try:
                on.fits(cfg, sides)
            except ValueError:
                continue
            return sides
    raise NotApplicable(f"no grid of about {n} places goes with these settings")


def shapes_of(places: int, axes: int) -> list[tuple[int, ...]]:
    """Ways to fill a grid of so many places, the squarest first."""
    if axes == 1:
        return [(places,)]
    found = []
    for a in (a for a in range(1, places + 1) if places % a == 0):
        found += [(a, *rest) for rest in shapes_of(places // a, axes - 1)]
    return sorted(found, key=lambda sides: (max(sides) - min(sides), sides))
