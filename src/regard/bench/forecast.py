"""What a comparison will take, before it is run: its cells, and their time from a probe of the model."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regard.bench.cell import FULL, Cell
from regard.bench.estimate import OWN_TOKENS, answer, batch
from regard.bench.timed import STEPS, TURNS
from regard.tasks import held_out

METHODS = 1.3  # what a method's passes take of full attention's, its scores and its eager steps included
WARM = 32  # tokens of a pass that nobody times


@dataclass(frozen=True)
class Probe:
    """Seconds of full attention: prompts of two lengths by themselves, a step of one row and of a batch."""

    prompts: tuple[tuple[int, float], tuple[int, float]]
    step: float
    batched: float

    def prompt(self, length: int) -> float:
        """Seconds of a prompt: between two lengths, and beyond them, as a power of its tokens."""
        (short, least), (long, most) = self.prompts
        if short == long:
            return least * length / short
        power = math.log(most / least) / math.log(long / short)
        return least * (length / short) ** power


def probe(model: Any, tokenizer: Any, lengths: Sequence[int], rows: int) -> Probe:
    """Time the shortest and the longest prompt, and steps, on this model in this process."""
    ids = held_out().ids(tokenizer)
    known = [n or OWN_TOKENS for n in lengths]
    with torch.inference_mode():
        timed(model, ids, WARM, 1)
        prompts = tuple((n, timed(model, ids, n, 1)[0]) for n in (min(known), max(known)))
        step, batched = (timed(model, ids, WARM, n)[1] for n in (1, rows))
    return Probe(prompts, step, batched)


def timed(model: Any, ids: Sequence[int], length: int, rows: int) -> tuple[float, float]:
    """Seconds of a prompt of so many tokens in so many rows, and of the step after it."""
    tokens = torch.tensor([list(ids) * (length // len(ids) + 1)], device=model.device)[:, :length]
    start = time.perf_counter()
    cache = model(tokens.expand(rows, -1), use_cache=True, logits_to_keep=1).past_key_values
    middle = time.perf_counter()
    model(tokens[:, :1].expand(rows, -1), past_key_values=cache, use_cache=True)
    return middle - start, time.perf_counter() - middle


def seconds(cell: Cell, found: Probe) -> float:
    """What a cell takes of one worker."""
    length, more = cell.length or OWN_TOKENS, 1.0 if cell.method == FULL else METHODS
    if cell.what == "timing":
        return (1 + more) * TURNS * (found.prompt(length) + STEPS * found.step)
    if cell.what == "crossing":
        return 8 * (1 + more) * found.prompt(length)
    turns = math.ceil(cell.samples / batch(cell)) * answer(cell)
    return more * (cell.samples * found.prompt(length) + turns * found.batched)


def forecast(cells: Sequence[Cell], todo: Sequence[Cell], load: Any, workers: int) -> dict[str, Any]:
    """Cells, those that an earlier start measured, and about how many seconds the others take; the model is loaded."""
    model, tokenizer = load()
    found = probe(model, tokenizer, [c.length for c in cells], max(batch(c) for c in cells))
    together = min(workers, len(todo)) or 1
    return {
        "cells": len(cells),
        "kept": len(cells) - len(todo),
        "workers": together,
        "seconds": sum(seconds(cell, found) for cell in todo) / together,
    }


def forecast_text(facts: dict[str, Any]) -> str:
    """The same in words.

    >>> forecast_text({"cells": 12, "kept": 3, "workers": 2, "seconds": 500})
    '12 cells, 3 of them measured before: about 8 min in 2 workers'
    """
    kept = f", {facts['kept']} of them measured before" if facts["kept"] else ""
    many = f"{facts['workers']} worker" + "s" * (facts["workers"] > 1)
    return f"{facts['cells']} cells{kept}: about {span(facts['seconds'])} in {many}"


def span(taken: float) -> str:
    """A time in words.

    >>> span(42), span(500), span(9000)
    ('42 s', '8 min', '2.5 h')
    """
    return (
        f"{taken:.0f} s"
        if taken < 90
        else f"{taken / 60:.0f} min"
        if taken < 5400
        else f"{taken / 3600:.1f} h"
    )
