"""Tracing: numbers that explain what a model did, through observers and edits."""

from collections.abc import Callable
from dataclasses import dataclass

from regard.core import Kind, Page


@dataclass(frozen=True, eq=False)
class TracingPage(Page):
    """An explanation of a model: measure(...) -> numbers per layer and head, through observers and edits.

    observer()            the Observer whose records `measure` reads
    ablate(heads, cfg)    edits that switch off what was found, to show that it is a cause
    """

    measure: Callable = None  # type: ignore[assignment]
    observer: Callable | None = None
    ablate: Callable | None = None
    kind = "tracing"


KIND = Kind(
    name="tracing",
    page=TracingPage,
    says="which heads, tokens and layers caused an output",
    verb="regard.trace(model, NAME, samples)",
    room="methods/tracing",
    checks="regard.testing.tracing:check_tracing_page",
)
