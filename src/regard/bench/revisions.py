"""What a cell's number hangs on: the content of texts, annotations, models and pages of one's own, and versions."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from regard import catalog
from regard.bench.cell import FULL, Cell
from regard.core.spec import parse_spec
from regard.models.revision import revision
from regard.models.shipped import source_of
from regard.tasks import Source


def with_revisions(cells: Sequence[Cell], model: Any, dtype: str | None = None) -> list[Cell]:
    """The cells with the content of all that they read from outside the package; what is no text is refused here."""
    text = cells[0].text
    source = None if text is None else text_revision(cells[0])
    common = {
        "text": source,
        "model": content_of(model),
        "dtype": dtype,
        "versions": versions(),
    }
    names = {name for c in cells for name in (c.method, page_of(c.task))} - {FULL}
    pages = {name: catalog.revision_of(name) for name in names}
    made = []
    for cell in cells:
        learned = cell.settings.get("learned")
        facts = {
            **common, "method": pages.get(cell.method), "task": pages[page_of(cell.task)],
            "learned": None if learned is None else revision(learned),
        }  # fmt: skip
        made.append(replace(cell, revisions={k: v for k, v in facts.items() if v is not None}))
    return made


def versions() -> str:
    """The versions under which a number stays what it is: of regard, and of the others without their last part."""
    others = (f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "transformers"))
    return ", ".join((f"regard {version('regard')}", *others))


def text_revision(cell: Cell) -> str:
    """The content of the text, or of the annotations of images, that cells read."""
    if cell.what != "pictures":
        return Source.from_path(cell.text or "").revision
    return str(revision(cell.text))


def page_of(task: str) -> str:
    """The page of a task that may bring settings."""
    return parse_spec(task)[0]


def content_of(model: Any) -> str | None:
    """The content of a model that does not come with this package."""
    held = model if isinstance(model, tuple) else source_of(model)
    return None if held is None else revision(held)


def content(cells: Sequence[Cell]) -> dict[str, str]:
    """What the run read from outside the package, by name: text, model and pages of one's own."""
    known = {}
    for cell in cells:
        names = {"method": cell.method, "task": cell.task, "learned": f"{cell.method}:learned"}
        known |= {names.get(what, what): held for what, held in cell.revisions.items()}
    return known
