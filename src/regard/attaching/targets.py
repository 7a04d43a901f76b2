"""Which heads, rows and stored slots of one call a site names."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.attaching.step import has_role
from regard.core import Site
from regard.core.edit import int_tuple
from regard.ops import View, per_query_head


def rows_of(site: Site, new: int, fed: int | None = None) -> list[int]:
    """Query rows of this forward that a site names; those it does not have are left out.

    `fed` tokens came in this forward; where there are fewer queries they are those of the last tokens.

    >>> rows_of(Site(rows=(0, 3, -1)), 4), rows_of(Site(rows=(0, 3, -1)), 2, fed=4)
    ([0, 3], [1])
    """
    rows = int_tuple(site.rows)
    if rows is None:
        return list(range(new))
    fed = new if fed is None else fed
    return sorted({r % fed - (fed - new) for r in rows if -fed <= r < fed and r % fed >= fed - new})


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
        index = torch.tensor(keys, device=view.index.device)
        index = torch.where(index < 0, index + view.seen, index)
        hit = torch.isin(view.index, index) & (view.index >= 0)
    hit = hit[:, :, None]
    return hit if hit.shape[1] == 1 else per_query_head(hit, view.q.shape[1])[:, heads]


def seen_columns(
    view: View, keys: Any, roles: dict[str, Tensor], heads: list[int], rows: list[int]
) -> Tensor:
    """[B, 1|heads, 1|rows, n] bool: the slots that are these tokens, where the query sees them."""
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
