"""Tracing: numbers that explain what a model did, through observers and edits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from regard.core import Kind, Page


@dataclass(frozen=True)
class Answers:
    """What was asked and answered while an observer wrote down."""

    prompt: Tensor  # [B, n] ids
    emitted: Tensor  # [B, T] ids that the model generated
    answer: Tensor  # [B, T] ids that were right
    spans: tuple[
        tuple[int, int], ...
    ]  # where the answer stands in each prompt: first and past-the-last position


@dataclass(frozen=True, eq=False)
class TracingPage(Page):
    """An explanation of a model: numbers per layer and head, through observers and edits.

    measure(...)             the mathematics, on tensors
    reference(...)           the same by its definition, in float64, plain: shares nothing with `measure`
    cases(seed)              arguments of both, a tuple each: what the checks compare them on
    observer()               the Observer whose records `score` reads
    score(steps, answers)    [B, heads] of one layer from its records, one for each generated token
    ablate(heads, cfg)       edits that switch off what was found, to show that it is a cause
    """

    measure: Callable = None  # type: ignore[assignment]
    reference: Callable = None  # type: ignore[assignment]
    cases: Callable = None  # type: ignore[assignment]
    observer: Callable | None = None
    score: Callable | None = None
    ablate: Callable | None = None
    kind = "tracing"


KIND = Kind(
    name="tracing",
    page=TracingPage,
    says="which heads, tokens and layers caused an output",
    verb='regard.trace(model, NAME, [regard.catalog.task("needle").samples(tokenizer, 512, 10, seed=0)])',
    room="methods/tracing",
    checks="regard.testing.tracing:check_tracing_page",
)
