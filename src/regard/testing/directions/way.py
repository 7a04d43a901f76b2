"""A row of the tables of directions: which quantity a larger value of a setting raises or lowers, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SURE = 1e-9  # relative; what is measured is exact, or averaged over a run


@dataclass(frozen=True)
class Way:
    """A larger value of a setting raises (sign 1) or lowers (-1) a quantity: seen at `small` and `large`."""

    quantity: str
    sign: int
    small: Any
    large: Any
    beside: Mapping[str, Any] = field(default_factory=dict)  # settings without which nothing is seen


Row = str | Way | tuple[Way, ...]  # a reason for no direction, or what is raised and lowered
Table = Mapping[str, Row]
# (page, quantity, settings) -> the quantity, by where it was asked
Measure = Callable[[str, str, Mapping[str, Any]], dict[str, float]]


def more(quantity: str, small: Any, large: Any, **beside: Any) -> Way:
    return Way(quantity, 1, small, large, beside)


def less(quantity: str, small: Any, large: Any, **beside: Any) -> Way:
    return Way(quantity, -1, small, large, beside)


def check_way(name: str, setting: str, way: Way, measure: Measure) -> None:
    """At the larger value the quantity is more, or less, than at the smaller one: nowhere the other way."""
    low, high = (
        measure(name, way.quantity, {**way.beside, setting: value}) for value in (way.small, way.large)
    )
    moved = False
    for where in low.keys() & high.keys():
        a, b = low[where], high[where]
        by, sure = way.sign * (b - a), SURE * max(abs(a), abs(b))
        said = f"{name}{where}: {setting} {way.small} -> {way.large} takes {way.quantity} from {a:.6g} to {b:.6g}"
        assert by >= -sure, f"{said}, and should {'raise' if way.sign > 0 else 'lower'} it"
        moved = moved or by > sure
    assert moved, f"{name}: {setting} {way.small} -> {way.large} leaves {way.quantity} as it is: {low}"
