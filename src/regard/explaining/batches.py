"""Pairs and what is asked of them, in forwards of so many texts: one loop for every exact scan."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core import require
from regard.explaining.pairs import CONSTANT, Pairs
from regard.ops.machine import trim_memory

Progress = Callable[[int, int], Any]  # done, of how many
# of the pairs with these numbers: ([pairs] what effects are a share of, [pairs, cells] of the cells with these numbers)
Begun = tuple[Tensor, Callable[[list[int]], Tensor]]
Begin = Callable[[Pairs, list[int]], Begun]
TOKENS = 8192  # of texts in one forward: bounds the memory, never changes the result


def by_cell(
    pairs: Pairs, cells: int, begin: Begin, *, batch: int | None = None, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """([pairs, cells], [pairs] the span), float64: some pairs begin, and are asked as many cells as fit in a forward.

    Raises ValueError where the span is 0.
    """
    values = torch.zeros(len(pairs), cells, dtype=torch.float64)
    span, step, done = torch.zeros(len(pairs), dtype=torch.float64), texts_at_once(pairs, batch), 0
    for group in in_groups(len(pairs), step):
        found, ask = begin(pairs.at(group), group)
        span[group] = found.double().cpu()
        for some in split(range(cells), max(1, step // len(group))):
            values[torch.tensor(group)[:, None], torch.tensor(some)] = ask(some).double().cpu()
            done += len(some) * len(group)
            if progress is not None:
                progress(done, cells * len(pairs))
        trim_memory()
    refuse_constant(span)
    return values, span


def texts_of(number: int, pairs: int) -> tuple[int, ...]:
    """The texts of a batch, in which the pairs stand several times over, that are the pairs for this time."""
    return tuple(range(number * pairs, (number + 1) * pairs))


def texts_at_once(pairs: Pairs, batch: int | None) -> int:
    width = max(pairs.clean.ids.shape[1], pairs.corrupt.ids.shape[1])
    require(batch is None or batch >= 1, "a batch has a text", batch=batch)
    return max(1, TOKENS // width) if batch is None else batch


def in_groups(count: int, size: int) -> list[list[int]]:
    """Numbers of pairs in groups of nearly equal size, none larger than this."""
    groups = -(-count // size)
    edges = [count * i // groups for i in range(groups + 1)]
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def split(cells: Sequence[int], size: int) -> list[list[int]]:
    return [list(cells[i : i + size]) for i in range(0, len(cells), size)]


def refuse_constant(span: Tensor) -> None:
    """Raise where the metric does not tell clean prompts from corrupted ones."""
    rule = "the metric differs between clean and corrupted prompts"
    require(float(span.abs().max()) > CONSTANT, rule, largest_difference=float(span.abs().max()))
    rule = "the mean of the metric differs between clean and corrupted prompts (they cancel)"
    require(abs(float(span.mean())) > CONSTANT, rule, mean_difference=float(span.mean()))
