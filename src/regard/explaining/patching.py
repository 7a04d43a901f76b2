"""Activation patching: what a metric becomes when one site of a run gets what it had in another. Exact, in batches.

    denoise   the corrupted prompt is run, and the site gets what it had on the clean one: what it restores
    noise     the clean prompt is run, and the site gets what it had on the corrupted one: what is lost without it

Sites of several pairs are patched in one forward: each text of the batch has an edit of its own, and sees no other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, require
from regard.core.edit import HEADED
from regard.explaining.batches import Begun, Progress, by_cell, texts_of
from regard.explaining.effects import Effects
from regard.explaining.grid import Grid, cells_of, grid_of
from regard.explaining.kept import Kept, header
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.runs import Values, at_site, capture, forward

Direction = Literal["denoise", "noise"]


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

    def begin(part: Pairs, group: list[int]) -> Begun:
        run = Run.of(model, part, grid, direction)

        def ask(some: list[int]) -> Tensor:
            cells = [chosen[i] for i in some]
            key = f"{group[0]}-{group[-1]}/{','.join(map(str, cells))}"
            if key not in done.rows:
                done.add(key, run.patched(model, part, grid, cells))
            return torch.tensor(done.rows[key], dtype=torch.float64)

        return run.span, ask

    found, span = by_cell(pairs, len(chosen), begin, batch=batch, progress=progress)
    values = torch.full((len(pairs), len(grid.sites())), torch.nan, dtype=torch.float64)
    values[:, chosen] = found
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
        edits = [self.edit(grid, sites[cell], texts_of(i, count)) for i, cell in enumerate(cells)]
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
