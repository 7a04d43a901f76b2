"""Every setting of a cache page moves what it chooses: two runs on one input that differ in one setting."""

from dataclasses import fields
from typing import Any

from regard import catalog
from regard.core.pages import changed_settings
from regard.testing.cache.choice import MOVED
from regard.testing.cache.definition import Definition
from regard.testing.cache.oracle import gap
from regard.testing.cache.script import Tape


def check_moves(setting: str, one: Tape, other: Tape) -> None:
    """Two runs on the same input that differ in one setting hold or read other tokens, or answer otherwise."""
    moved = gap(one.feeds, one.outs, other.outs)
    said = f"{setting} changes nothing that is held or read, and {moved:.1e} in logits"
    assert chosen(one) != chosen(other) or moved > MOVED, said


def chosen(tape: Tape) -> list:
    """What each forward held and read, by layer."""
    alive = [{i: read.alive for i, read in reads.items() if read.alive is not None} for reads in tape.reads]
    return [
        [{i: x.tolist() for i, x in layers.items()} for layers in tables] for tables in (tape.held, alive)
    ]


def asked_of(definition: type[Definition]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """What is asked of a page, (family, settings), by what it is asked for: a setting's two values, more, a window."""
    found = {
        name: [(definition.families.get(name, "llama"), settings) for settings in pair]
        for name, pair in definition.moves.items()
    }
    found |= {f"more_{i}": [("llama", settings)] for i, settings in enumerate(definition.more)}
    return found if definition.slides is None else {**found, "slides": [("mistral", definition.slides)]}


def check_all_settings_move(name: str, definition: type[Definition]) -> None:
    """Every setting of the page has its two values, which differ in nothing else."""
    names = {f.name for f in fields(catalog.get(name).config)}
    assert set(definition.moves) == names, (
        f"settings {sorted(names ^ set(definition.moves))} are not as the page has them"
    )
    for setting, (one, other) in definition.moves.items():
        a, b = (catalog.method(name, **settings).config for settings in (one, other))
        differ = [said.rpartition(".")[2] for said, _ in changed_settings(a, b)]
        assert differ == [setting], f"the two settings of {setting} differ in {differ}"
