"""The kinds of pages, a module each: what a page provides, its verb, and the checks that it must pass.

A kind is found by its file: catalogue, command line, tests and documents iterate over `kinds()`.
"""

from datetime import date
from functools import cache
from importlib import import_module
from pathlib import Path

from regard.core import Kind, require, unknown

HERE = Path(__file__).parent


@cache
def kinds() -> dict[str, Kind]:
    """Name -> Kind, in alphabetical order.

    >>> list(kinds())
    ['block', 'cache', 'mask', 'mechanism', 'position', 'steering', 'task', 'tokens', 'tracing']
    """
    modules = [import_module(f"regard.kinds.{stem}").KIND for stem in kind_names()]
    return {kind.name: kind for kind in modules}


@cache
def kind_names() -> tuple[str, ...]:
    """Names of the kinds, by their files: none of them is imported."""
    return tuple(sorted(path.stem for path in HERE.glob("[!_]*.py")))


def skeleton(kind_name: str, name: str) -> str:
    """The text of a new page of this kind: one that works, to be rewritten. It passes the checks of its kind."""
    require(name.isidentifier() and name.islower(), "a page's name is a lower-case Python name", name=name)
    text = (HERE / "skeletons" / f"{kind(kind_name).name}.txt").read_text(encoding="utf8")
    title = name.replace("_", " ").capitalize()
    for word, value in (
        ("TITLE", title),
        ("NAME", name),
        ("FILE", f"{name}.py"),
        ("YEAR", str(date.today().year)),
    ):
        text = text.replace(word, value)
    return text


def kind(name: str) -> Kind:
    """The kind of this name; KeyError with the near names if there is none."""
    if name not in kind_names():
        raise unknown("kind of page", name, kind_names())
    return kinds()[name]
