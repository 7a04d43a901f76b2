"""What was typed, judged before anything that is slow to import: names, numbers, folders, texts, devices.

All of it raises what the command ends with, the rule and the value; nothing is made or written.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.core.errors import require, unknown
from regard.core.spec import parse_spec, split_list, split_specs

Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1 or mps; none: the CPU for models of ours, else a GPU if any."
    ),
]


def choice(option: str, value: str, known: Iterable[str]) -> str:
    """One of these words."""
    known = tuple(known)
    if value not in known:
        raise unknown(f"value of {option}", value, known)
    return value


def numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """Numbers with commas between; None for None.

    >>> numbers("--lengths", "256, 512", int)
    (256, 512)
    >>> numbers("--rates", "abc", float)
    Traceback (most recent call last):
    ...
    ValueError: must hold: --rates are numbers with commas between (rates='abc', wrong='abc')
    """
    if text is None:
        return None
    found, what = [], "whole numbers" if kind is int else "numbers"
    for part in split_list(text) or [""]:
        try:
            found.append(kind(part))
        except ValueError:
            rule = f"{option} are {what} with commas between"
            require(False, rule, **{option.lstrip("-"): text, "wrong": part})
    return tuple(found)


def at_least(least: int, **counts: int | None) -> None:
    """Refuse counts below this; None is one that was not given."""
    for name, count in counts.items():
        require(count is None or count >= least, f"{name} >= {least}", **{name: count})


def mechanism(text: str) -> tuple[str, dict[str, Any]]:
    """(name, settings) of one mechanism, whose page there is; it is not imported."""
    from regard import catalog

    name, settings = parse_spec(text)
    known = catalog.pages()
    if name not in known:
        rooms = ("mechanism", "block", None)
        raise unknown("mechanism", name, (n for n in known if catalog.kind_by_room(n) in rooms))
    return name, settings


def run(text: str) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """(names by layer, settings by name) of what is trained: "softmax,gla:chunk=32"."""
    parts = [mechanism(part) for part in split_specs(text) or []]
    require(parts, "a mechanism has a name", mechanism=text)
    settings: dict[str, dict[str, Any]] = {}
    for name, own in parts:
        require(
            settings.get(name, own) == own, "a mechanism has the same settings in all layers", mechanism=text
        )
        settings[name] = own
    return tuple(name for name, _ in parts), {name: own for name, own in settings.items() if own}


def free(folder: Path, *ours: str) -> None:
    """Refuse a folder that is a file, lies under one, cannot be written to, or holds what is not ours.

    ours   names of files that a run of this kind leaves: where one lies there, the run itself judges the folder
    """
    from regard.report.folder import vacant, writable

    if any((folder / name).exists() for name in ours):
        writable(folder)
    else:
        vacant(
            folder,
            "the output folder is new, empty or of an earlier start of this command; choose another --out",
        )


def text_file(path: Path | None) -> None:
    """Refuse a text that cannot be read, or is none."""
    if path is not None:
        from regard.tasks.corpus import Source

        Source.from_path(path)
