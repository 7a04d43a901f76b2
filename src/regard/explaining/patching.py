"""Activation patching: what a metric becomes when one site of a run gets what it had in another. Exact, in batches.

    denoise   the corrupted prompt is run, and the site gets what it had on the clean one: what it restores
    noise     the clean prompt is run, and the site gets what it had on the corrupted one: what is lost without it

Sites of several pairs are patched in one forward: each text of the batch has an edit of its own, and sees no other.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, require
from regard.core.edit import HEADED
from regard.explaining.effects import Effects
from regard.explaining.grid import Grid, cells_of, grid_of
from regard.explaining.kept import Kept, header
from regard.explaining.pairs import CONSTANT, Batch, Pairs
from regard.explaining.runs import Values, at_site, capture, forward

Direction = Literal["denoise", "noise"]
Progress = Callable[[int, int], Any]  # done, of how many
TOKENS = 8192  # of texts in one forward: bounds the memory, never changes the result


@torch.no_grad()
def patch(
    model: PreTrainedModel,
    pairs: Pairs,
    quantity: str = "z",
    *,
    layers: Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    sites: Iterable[Sequence[int]] | None = None,
    direction: Direction = "denoise",
    batch: int | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The exact effect of every site of a quantity on the metric of the pairs.

    quantity   "z" (head outputs), "q", "k", "v", "out", "mlp", "resid_pre", "resid_mid" or "resid_post"
    rows       tokens whose activations are patched together (-1: the last); None: all
    tokens     tokens that are patched one by one, an axis of the result
    sites      (layer, head, token) of the grid's axes to be measured; the others stay NaN and not exact. None: all
    batch      texts in a forward; None: what makes 8,192 tokens
    folder     where measured cells are kept as they end; the same call goes on there

    Effects [pairs, layer, head (of heads), token (if asked)]. Raises ValueError for a metric that does not tell the
    clean prompts from the corrupted, and for sites that are not there.
    """
    pairs = pairs.to(model.device)
    grid = grid_of(model, quantity, layers, rows, tokens)
    done = Kept.open(folder, lambda: header(model, pairs, grid, direction))
    chosen = cells_of(grid, sites)
    values = torch.full((len(pairs), len(grid.sites())), torch.nan, dtype=torch.float64)
    span = torch.zeros(len(pairs), dtype=torch.float64)
    step = texts_at_once(pairs, batch)
    total, count = len(chosen) * len(pairs), 0
    for group in in_groups(len(pairs), step):
        part = pairs.at(group)
        run = Run.of(model, part, grid, direction)
        span[group] = run.span.double().cpu()
        for cells in split(chosen, max(1, step // len(group))):
            key = f"{group[0]}-{group[-1]}/{','.join(map(str, cells))}"
            if key not in done.rows:
                done.add(key, run.patched(model, part, grid, cells))
            values[torch.tensor(group)[:, None], torch.tensor(cells)] = torch.tensor(
                done.rows[key], dtype=torch.float64
            )
            count += len(cells) * len(group)
            if progress is not None:
                progress(count, total)
    refuse_constant(span)
    exact = torch.zeros(len(grid.sites()), dtype=torch.bool)
    exact[chosen] = True
    settings = {"quantity": quantity, "direction": direction, "method": "patching", "rows": grid.rows}
    shaped = values.view(len(pairs), *grid.shape)
    return Effects(shaped, grid.dims, grid.coords, span, exact.view(grid.shape), settings)


@dataclass(frozen=True)
class Run:
    """The prompts that are run, what their sites are given, and the metric of both sides."""

    base: Batch
    given: Values
    usable: Tensor | None  # [B, M] columns that have a donor; None: all
    before: Tensor  # [B] metric of what is run
    span: Tensor  # [B] clean - corrupt
    sign: float

    @staticmethod
    def of(model: PreTrainedModel, pairs: Pairs, grid: Grid, direction: Direction) -> "Run":
        require(direction in ("denoise", "noise"), 'direction is "denoise" or "noise"', direction=direction)
        if direction == "noise":
            other = Run.of(model, pairs.swapped(), grid, "denoise")
            return replace(other, span=-other.span, sign=-1.0)
        logits, values = capture(model, pairs.clean, [grid.quantity], grid.layers)
        base, _ = forward(model, pairs.corrupt)
        given, usable = {}, None
        for layer, x in values[grid.quantity].items():
            given[layer], usable = pairs.donor(x)
        clean, corrupt = pairs.score(logits), pairs.score(base)
        return Run(pairs.corrupt, {grid.quantity: given}, usable, corrupt, clean - corrupt, 1.0)

    def patched(
        self, model: PreTrainedModel, pairs: Pairs, grid: Grid, cells: Sequence[int]
    ) -> list[list[float]]:
        """[pairs][cells] change of the metric."""
        count, sites = len(self.base), grid.sites()
        edits = [
            self.edit(grid, sites[cell], tuple(range(i * count, (i + 1) * count)))
            for i, cell in enumerate(cells)
        ]
        logits, _ = forward(model, self.base.repeated(len(cells)), edits)
        change = pairs.score(logits).view(len(cells), count) - self.before
        return (self.sign * change).T.tolist()

    def edit(self, grid: Grid, site: tuple, texts: tuple[int, ...]) -> Edit:
        layer, head, token = site
        value = self.given[grid.quantity][layer][:, head if grid.quantity in HEADED else 0]
        rows = grid.rows if token is None else (token,)
        if rows is None and self.usable is None:
            return at_site(grid.quantity, layer, head, value, texts=texts)
        named = self.rows_with_donor(rows)
        return at_site(grid.quantity, layer, head, picked(value, self.base, named), texts=texts, rows=named)

    def rows_with_donor(self, rows: tuple[int, ...] | None) -> tuple[int, ...]:
        """Numbers of tokens, from the end, at which every text has a donor."""
        width = self.base.ids.shape[1]
        shortest = int(self.base.lengths.min())
        ok = torch.ones(width, dtype=torch.bool) if self.usable is None else self.usable.all(0).cpu()
        if rows is None:
            named = [c - width for c in range(width - shortest, width) if bool(ok[c])]
            require(
                bool(named),
                "tokens that all pairs of a batch align; give fewer pairs at once",
                pairs=len(self.base),
            )
            return tuple(named)
        same = len(set(self.base.lengths.tolist())) == 1
        require(
            same or all(r < 0 for r in rows),
            "rows of prompts of unequal length are counted from their end",
            rows=rows,
        )
        named = [r if r < 0 else r - shortest for r in rows]
        missing = [r for r in named if not -shortest <= r < 0 or not bool(ok[r])]
        require(not missing, "rows that every prompt has, and a donor for each", rows=rows, tokens=shortest)
        return tuple(named)


def picked(value: Tensor, base: Batch, rows: tuple[int, ...]) -> Tensor:
    """[B, rows, width] of value [B, N, width] at rows counted from the end, in the order in which sites hold them."""
    return value[:, sorted(r + base.ids.shape[1] for r in rows)]


def refuse_constant(span: Tensor) -> None:
    """Raise where the metric does not tell clean prompts from corrupted ones."""
    rule = "the metric differs between clean and corrupted prompts"
    require(float(span.abs().max()) > CONSTANT, rule, largest_difference=float(span.abs().max()))
    rule = "the mean of the metric differs between clean and corrupted prompts (they cancel)"
    require(abs(float(span.mean())) > CONSTANT, rule, mean_difference=float(span.mean()))


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
