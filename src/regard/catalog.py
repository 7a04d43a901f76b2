"""The catalogue finds its pages by where they lie; a page is imported when it is asked for."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from regard.core import Method, Page, require, unknown

HERE = Path(__file__).parent
ROOMS = ("methods/*/[!_]*.py", "methods/*/*/[!_]*.py", "tasks/[!_]*.py")


@cache
def pages() -> dict[str, str]:
    """Name -> module of every page, in alphabetical order: files of the method rooms that define METHOD."""
    found: dict[str, str] = {}
    for path in sorted((p for room in ROOMS for p in HERE.glob(room)), key=lambda p: p.stem):
        if "\nMETHOD = " not in path.read_text(encoding="utf8"):
            continue
        module = "regard." + ".".join(path.relative_to(HERE).with_suffix("").parts)
        require(path.stem not in found, "two pages share a name", one=found.get(path.stem), other=module)
        found[path.stem] = module
    return found


def path_of(name: str) -> Path:
    return HERE / Path(*pages()[name].split(".")[1:]).with_suffix(".py")


def get(name: str) -> Page:
    """The page of this name; KeyError with the near names if there is none."""
    if name not in pages():
        raise unknown("method", name, pages())
    return import_module(pages()[name]).METHOD


def method(name: str, **config: Any) -> Method:
    """A configured page: `method("streaming_llm", sinks=4, window=512)`."""
    page = get(name)
    return Method(name, page, page.configure(**config))


def every() -> Iterator[tuple[str, Page]]:
    return ((name, get(name)) for name in pages())


def find(kind: str | None = None, pattern: str | None = None) -> list[str]:
    """Names of the pages of a kind that can do a pattern; None: any."""
    kinds = sorted({page.kind for _, page in every()})
    if kind is not None and kind not in kinds:
        raise unknown("kind of page", kind, kinds)
    return [
        name
        for name, page in every()
        if (kind is None or page.kind == kind) and (pattern is None or pattern in page.patterns)
    ]
