"""The sites of a scan: which layers, heads and tokens a quantity is asked at, as the axes of a tensor."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.core import require
from regard.core.edit import HEADED, STREAMS
from regard.explaining.runs import heads_at, layers_of


@dataclass(frozen=True)
class Grid:
    """The sites of a scan: a quantity by layer, by head where it has heads, by token where each is asked alone."""

    quantity: str
    layers: tuple[int, ...]
    heads: int
    tokens: tuple[int, ...] | None = (
        None  # rows that are patched one by one; None: all rows of a text together
    )
    rows: tuple[int, ...] | None = None  # rows that are patched together; None: all

    @property
    def dims(self) -> tuple[str, ...]:
        by_head = ("head",) if self.quantity in HEADED else ()
        return ("layer", *by_head, *(("token",) if self.tokens is not None else ()))

    @property
    def coords(self) -> dict[str, Sequence[int]]:
        all_of = {"layer": self.layers, "head": range(self.heads), "token": self.tokens or ()}
        return {d: all_of[d] for d in self.dims}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.coords[d]) for d in self.dims)

    def sites(self) -> list[tuple[int, ...]]:
        """(layer, head or 0, token or -1 for all) of every cell, in the order of a tensor of this shape."""
        heads = range(self.heads) if self.quantity in HEADED else (0,)
        return [(n, h, t) for n in self.layers for h in heads for t in (self.tokens or (None,))]  # type: ignore[misc]


def grid_of(
    model: PreTrainedModel, quantity: str, layers: Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None, tokens: Sequence[int] | None = None,
) -> Grid:  # fmt: skip
    """The grid of a quantity over the layers of a model; what the model lacks is an error by name."""
    known = layers_of(model) if quantity in HEADED else [layer.number for layer in anatomy(model)]
    chosen = tuple(known if layers is None else layers)
    missing = sorted({*chosen} - {*known})
    rule = f"layers of this model that have {quantity}"
    require(not missing, rule, layers=missing, of=len(known))
    require(quantity in (*HEADED, *STREAMS[:-1]) and quantity not in ("scores", "weights"),
            "a scan patches q, k, v, z, out, mlp or the residual", quantity=quantity)  # fmt: skip
    row = (rows,) if isinstance(rows, int) else None if rows is None else tuple(rows)
    return Grid(quantity, chosen, heads_at(quantity, model), None if tokens is None else tuple(tokens), row)


def cells_of(grid: Grid, sites: Iterable[Sequence[int]] | None) -> list[int]:
    """Numbers of cells, all or those of these coordinates."""
    if sites is None:
        return list(range(len(grid.sites())))
    coords = [tuple(site[d] for d in range(len(grid.dims))) for site in sites]
    known = {c: i for i, c in enumerate(product_of(grid))}
    missing = [c for c in coords if c not in known]
    require(
        not missing, f"sites are {', '.join(grid.dims)} of this model", sites=missing[:4], grid=grid.shape
    )
    return sorted({known[c] for c in coords})


def product_of(grid: Grid) -> list[tuple[int, ...]]:
    return list(itertools.product(*(grid.coords[d] for d in grid.dims)))
