"""What run.json says of the methods, so that a report needs no catalogue: their cards, how they are attached."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from regard import catalog
from regard.bench.cell import FULL, Cell
from regard.core.pages import Page
from regard.report.applied import text

FACTS = ("title", "paper", "year", "idea", "cost", "state", "caveat")


def told(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """`cards` by method, `attached` by label: of methods laid over one another also the cards of each part."""
    cells = [cell for cell in cells if cell.method != FULL]
    names = dict.fromkeys(cell.method for cell in cells)
    cards = {part: card(catalog.get(part)) for name in names for part in parts_of(name)}
    for name in names:
        parts = parts_of(name)
        cards[name] = (title(name) if "+" in name else card(catalog.get(name))) | {"parts": parts}
    return {"cards": cards, "attached": {cell.label: attached(cell) for cell in cells}}


def parts_of(name: str) -> list[str]:
    """The pages that a method is made of, where they are several, from the innermost to the outermost."""
    return [part for part, _ in catalog.method(name).page.parts if part in catalog.pages()]


def title(name: str) -> dict[str, Any]:
    """Of several pages together: the parts have the cards."""
    page = catalog.get(name)
    return {"kind": page.kind, "title": page.card.title}


def card(page: Page) -> dict[str, Any]:
    """A card's facts, the page's kind and its settings' defaults as Python writes them."""
    usual = page.config()
    defaults = {f.name: text(getattr(usual, f.name)) for f in fields(page.config)}
    return {"kind": page.kind, **{name: getattr(page.card, name) for name in FACTS}, "defaults": defaults}


def attached(cell: Cell) -> dict[str, Any]:
    """What `attach` takes for a cell: name, settings, and of pages of one's own the files to register first.

    words  it asks the model in words, and so is given the tokenizer
    """
    own = [str(catalog.path_of(part)) for part in cell.method.split("+") if catalog.revision_of(part)]
    settings = {name: text(value) for name, value in cell.settings.items()}
    words = {"words": True} if getattr(catalog.get(cell.method), "reread", None) is not None else {}
    return {"method": cell.method, "settings": settings, "pages": own, **words}
