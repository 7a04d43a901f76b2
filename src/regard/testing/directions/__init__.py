"""Every setting moves its result in the direction that its description states: more, or less, of something measured.

The tables say by the name of a setting which quantity a larger value raises or lowers, and two values to see it at.
Where the same word means something else a page has a row of its own, `page.setting`, and where a setting has no
direction the row says why. `check_directions(name)` measures a page at both values.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from regard import catalog
from regard.core import Page
from regard.testing.directions import caches, layers, mechanisms, models
from regard.testing.directions.way import Measure, Row, Table, Way, check_way
from regard.testing.options import counts

KINDS: Mapping[str, tuple[Table, Measure]] = {
    "cache": (caches.CACHES, caches.measure),
    "mechanism": (mechanisms.MECHANISMS, mechanisms.measure),
    "block": (layers.BLOCKS, layers.measure_block),
    "mask": (layers.MASKS, layers.measure_place),
    "position": (layers.POSITIONS, layers.measure_place),
    "steering": (models.STEERING, models.measure),
    "tokens": (models.TOKENS, models.measure),
}


def numbers(page: Page) -> list[str]:
    """The settings that are numbers, or may be: not those of speed, nor those that say how many tokens there are."""
    hints, idle = get_type_hints(page.config), {*getattr(page, "speed_settings", ()), *counts(page)}
    names = [f.name for f in fields(page.config) if f.name not in idle]
    return [name for name in names if {int, float} & kinds_of(hints[name])]


def kinds_of(hint: Any) -> set[Any]:
    return {hint} if get_origin(hint) is tuple else {hint, *get_args(hint)}


def row(name: str, setting: str) -> Row | None:
    """What the table says of a page's setting: the page's own row before that of the word."""
    table, _ = KINDS[catalog.get(name).kind]
    return table.get(f"{name}.{setting}", table.get(setting))


def ways(name: str) -> list[tuple[str, Way]]:
    """All that a larger value of a page's settings raises or lowers."""
    found = []
    for setting in numbers(catalog.get(name)):
        said = row(name, setting)
        each = (said,) if isinstance(said, Way) else () if said is None or isinstance(said, str) else said
        found += [(setting, way) for way in each]
    return found


def check_directions(name: str) -> list[str]:
    """Every setting that has a direction moves its page that way; what was asked. Raises AssertionError."""
    _, measure = KINDS[catalog.get(name).kind]
    for setting, way in ways(name):
        check_way(name, setting, way, measure)
    return [setting for setting, _ in ways(name)]


def unsaid() -> list[str]:
    """Settings of the catalogue that no row speaks of, and rows that speak of none."""
    missing, idle = [], {(kind, said) for kind, (table, _) in KINDS.items() for said in table}
    for name, page in catalog.every():
        for setting in numbers(page) if page.kind in KINDS else ():
            missing += [f"{name}.{setting}"] if row(name, setting) is None else []
            own = (page.kind, f"{name}.{setting}")
            idle -= {own if own in idle else (page.kind, setting)}
    return missing + [f"{kind}: {said}" for kind, said in sorted(idle)]
