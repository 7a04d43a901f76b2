"""Which heads, rows and stored slots of one call a site names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.attaching.step import has_role
from regard.core import Site
from regard.core.edit import int_tuple
from regard.ops import View, per_query_head


@dataclass(frozen=True)
class Rows:
    """The queries of a forward that a site names.

    A row number counts the tokens of the forward that are not padding, so it may be another column in each text of the
    batch. `columns` are all of them, ascending; `number` [B, columns] says which of the site's rows a column is in each
    text (-1: none); None: the same in all, and column i is row i of the site.
    """

    columns: list[int]
    number: Tensor | None = None

    def here(self, columns: Sequence[int]) -> Tensor | None:
        """[B, 1, columns, 1] bool: the texts in which these columns are named; None: all."""
        if self.number is None:
            return None
        at = [self.columns.index(c) for c in columns]
        return (self.number[:, at] >= 0)[:, None, :, None]

    def count(self) -> int:
        """Rows of the site that the longest text has."""
        return len(self.columns) if self.number is None else int(self.number.max()) + 1

    def picked(self, x: Tensor, none: float) -> Tensor:
        """[B, heads, rows, ...] of x [B, heads, columns, ...]; `none` where a text has fewer rows."""
        if self.number is None:
            return x
        wanted = torch.arange(self.count(), device=x.device)
        hit = self.number[:, None] == wanted[:, None]  # [B, rows, columns]
        at = hit.to(torch.uint8).argmax(-1)[:, None].view(len(hit), 1, -1, *[1] * (x.dim() - 3))
        there = hit.any(-1).view(len(hit), 1, -1, *[1] * (x.dim() - 3))
        return torch.where(there, x.take_along_dim(at, 2), none)


def rows_of(site: Site, view: View) -> Rows:
    """Query rows of this forward that a site names; those it does not have are left out.

    Of the tokens that were fed a layer may compute the last queries alone: rows count the tokens all the same.
    """
    rows, new, fed, asking = int_tuple(site.rows), view.new, view.tokens_fed, view.among_fed()
    if rows is None:
        return Rows(list(range(new)))
    if asking is None:
        named = {r % fed - (fed - new) for r in rows if -fed <= r < fed}
        return Rows(sorted(r for r in named if r >= 0))
    fresh, place = asking.sum(-1).tolist(), (asking.cumsum(-1) - 1).masked_fill(~asking, -1)
    number = torch.full_like(place, -1)
    for b, n in enumerate(fresh):
        for i, row in enumerate(sorted({r % n for r in rows if -n <= r < n})):
            number[b, place[b] == row] = i
    number = number[:, fed - new :]
    columns = (number >= 0).any(0).nonzero().flatten().tolist()
    # counted anew where no text has a row
    there = number[number >= 0].unique()
    counted = torch.searchsorted(there, number.clamp(min=0)).masked_fill(number < 0, -1)
    return Rows(columns, counted[:, columns])


def heads_of(site: Site, heads: int) -> list[int]:
    chosen = int_tuple(site.heads)
    return list(range(heads)) if chosen is None else [h for h in chosen if h < heads]


def key_columns(view: View, keys: Any, roles: dict[str, Tensor], heads: list[int]) -> Tensor:
    """[B, 1|heads, 1, n] bool: the stored slots that are these tokens of the text."""
    if keys is None:
        hit = view.index >= 0
    elif isinstance(keys, str):
        if keys not in roles:
            raise KeyError(f"no role is called {keys!r}; roles here: {', '.join(roles) or 'none'}")
        label = has_role(roles[keys])
        index = view.index.expand(label.shape[0], -1, -1)
        hit = label.gather(1, index.clamp(min=0).flatten(1)).view(index.shape) & (index >= 0)
    else:
        hit = at_places(view, keys) & (view.index >= 0)
    hit = hit[:, :, None]
    return hit if hit.shape[1] == 1 else per_query_head(hit, view.q.shape[1])[:, heads]


def at_places(view: View, keys: tuple[int, ...]) -> Tensor:
    """[1|B, 1|g, n] bool: slots whose token has one of these places among the real ones; negative from the end."""
    rank, length, wanted = view.rank(), view.length(), torch.tensor(keys, device=view.index.device)
    places = torch.where(wanted < 0, wanted + length[:, None], wanted)  # [1|B, keys]
    if len(places) == 1:
        return torch.isin(rank, places)
    hit = torch.stack(
        [torch.isin(r, p) for r, p in zip(rank.expand(len(places), -1, -1), places, strict=True)]
    )
    return hit & view.hold()


def seen_columns(
    view: View, keys: Any, roles: dict[str, Tensor], heads: list[int], rows: Sequence[int]
) -> Tensor:
    """[B, 1|heads, 1|rows, n] bool: the slots that are these tokens, where the queries of these columns see them."""
    hit, seen = key_columns(view, keys, roles, heads), view.visible(slice(rows[0], rows[-1] + 1))
    if seen is None:
        return hit
    seen = seen if seen.shape[1] == 1 else seen[:, heads]
    return hit & (seen if seen.shape[2] == 1 else seen[:, :, [r - rows[0] for r in rows]])


def cells(sites: list[tuple[list[int], list[int]]]) -> Iterator[tuple[slice, list[int]]]:
    """Consecutive rows with the heads that any of the (heads, rows) names there."""
    spans = [(start, stop, heads) for heads, rows in sites for start, stop in runs(rows)]
    for start, stop in pairwise(sorted({at for span in spans for at in span[:2]})):
        heads = sorted({h for s, e, of_span in spans if s <= start and stop <= e for h in of_span})
        if heads:
            yield slice(start, stop), heads


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive rows as (start, stop): [1, 2, 3, 7] -> (1, 4), (7, 8)."""
    breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    for i, j in pairwise([0, *breaks, len(rows)]):
        yield rows[i], rows[j - 1] + 1
