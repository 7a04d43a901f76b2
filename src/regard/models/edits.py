"""Carrying out edits and observers: the touched heads and rows are recomputed, all others stay as they were."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import Edit, Observer
from regard.ops import View, mix, per_query_head, row_blocks


def rows_of(site: Any, new: int) -> list[int]:
    """Query rows of this forward that a site names; those it does not have are left out."""
    if site.rows is None:
        return list(range(new))
    return sorted({r % new for r in site.rows if -new <= r < new})


def heads_of(site: Any, heads: int) -> list[int]:
    return list(range(heads)) if site.heads is None else [h for h in site.heads if h < heads]


def key_columns(view: View, keys: Any, roles: dict[str, Tensor], heads: list[int]) -> Tensor:
    """[B, 1|heads, 1, n] bool: the stored slots that are these tokens of the text."""
    if keys is None:
        hit = view.index >= 0
    elif isinstance(keys, str):
        if keys not in roles:
            raise KeyError(f"no role is called {keys!r}; roles here: {', '.join(roles) or 'none'}")
        label = roles[keys]
        index = view.index.expand(label.shape[0], -1, -1)
        hit = label.gather(1, index.clamp(min=0).flatten(1)).view(index.shape) & (index >= 0)
    else:
        wanted = torch.tensor(keys, device=view.index.device)
        wanted = torch.where(wanted < 0, wanted + view.seen, wanted)
        hit = torch.isin(view.index, wanted) & (view.index >= 0)
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


def apply_edits(view: View, out: Tensor, touching: Any) -> Tensor:
    """out [B, H, N, E] with the edits of this site: on scores first, then on weights, then on z, each in order."""
    edits = [(e, r, heads_of(e.site, out.shape[1]), rows_of(e.site, view.new)) for e, r in touching.edits]
    edits = [(e, r, heads, rows) for e, r, heads, rows in edits if heads and rows]
    if not edits:
        return out
    out = out.clone()
    for rows, heads in cells([(heads, rows) for e, _, heads, rows in edits if e.site.quantity != "z"]):
        for block in row_blocks(rows.stop - rows.start, view.q.shape[0] * len(heads) * view.stored):
            cut = slice(rows.start + block.start, rows.start + block.stop)
            weights, share = edited_weights(view, touching, cut, heads), view.q.shape[1] // view.v.shape[1]
            out[:, heads, cut] = mix(weights, view.v[:, [h // share for h in heads]]).to(out.dtype)
    for edit, receipt, heads, rows in edits:
        if edit.site.quantity == "z":
            at = (slice(None), torch.tensor(heads)[:, None], torch.tensor(rows)[None])
            out[at] = changed(out[at], edit, told(edit, out, heads, rows))
            touching.met[id(edit)] = set(heads)
        if touching.met.get(id(edit)):
            receipt.note(touching.layer, touching.met[id(edit)])
    return out


def cells(sites: list[tuple[list[int], list[int]]]) -> Iterator[tuple[slice, list[int]]]:
    """Consecutive rows with the heads that any of the (heads, rows) names there."""
    spans = [(start, stop, heads) for heads, rows in sites for start, stop in runs(rows)]
    for start, stop in pairwise(sorted({at for span in spans for at in span[:2]})):
        heads = sorted({h for s, e, own in spans if s <= start and stop <= e for h in own})
        if heads:
            yield slice(start, stop), heads


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive rows as (start, stop): [1, 2, 3, 7] -> (1, 4), (7, 8)."""
    breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    for i, j in pairwise([0, *breaks, len(rows)]):
        yield rows[i], rows[j - 1] + 1


def edited_weights(
    view: View, touching: Any, rows: slice = slice(None), heads: list[int] | None = None
) -> Tensor:
    """[B, heads, rows, n] weights as the model uses them: those of the view, after every edit that covers them."""
    edits = [e for e, _ in touching.edits if e.site.quantity != "z"]
    if not edits:
        return view.weights(rows, heads)
    heads = list(range(view.q.shape[1])) if heads is None else heads
    places = range(view.new)[rows]
    x = edited(
        view.scores(rows, heads),
        view,
        [e for e in edits if e.site.quantity == "scores"],
        heads,
        places,
        touching,
    )
    x = view.normalise(x, rows, heads)
    return edited(x, view, [e for e in edits if e.site.quantity == "weights"], heads, places, touching)


def edited(
    x: Tensor, view: View, edits: list[Edit], heads: list[int], places: range, touching: Any
) -> Tensor:
    """x [B, heads, rows, n] with these edits where they cover it."""
    x = x.clone() if edits else x
    for edit in edits:
        own_heads = [h for h in heads_of(edit.site, view.q.shape[1]) if h in heads]
        own_rows = [r for r in rows_of(edit.site, view.new) if r in places]
        if not own_heads or not own_rows:
            continue
        at = (
            slice(None),
            torch.tensor([heads.index(h) for h in own_heads])[:, None],
            torch.tensor([r - places.start for r in own_rows])[None],
        )
        keys = seen_columns(view, edit.site.keys, touching.roles, own_heads, own_rows)
        if edit.verb == "move":
            to = seen_columns(view, edit.to, touching.roles, own_heads, own_rows)
            x[at] = moved(x[at], keys, to, edit.value)
            keys = keys & to.any(-1, keepdim=True)
        else:
            x[at] = torch.where(keys, changed(x[at], edit, told(edit, x, own_heads, own_rows, view)), x[at])
        if bool(keys.any()):
            touching.met.setdefault(id(edit), set()).update(own_heads)
    return x


def told(
    edit: Edit, like: Tensor, heads: list[int], rows: list[int], view: View | None = None
) -> Tensor | None:
    """The edit's value for these heads and rows: a number, or [B, heads, rows, width] cut from what was given."""
    if edit.value is None:
        return None
    value = torch.as_tensor(edit.value, dtype=like.dtype, device=like.device)
    if value.dim() == 0:
        return value
    own_heads = heads_of(edit.site, like.shape[1] if view is None else view.q.shape[1])
    own_rows = rows_of(edit.site, like.shape[2] if view is None else view.new)
    value = value.expand(like.shape[0], len(own_heads), len(own_rows), like.shape[-1])
    place = {r: i for i, r in enumerate(own_rows)}
    return value[:, [own_heads.index(h) for h in heads]][:, :, [place[r] for r in rows]]


def changed(x: Tensor, edit: Edit, value: Tensor | None) -> Tensor:
    """x after replace, scale or block."""
    if edit.verb == "block":
        return torch.full_like(x, -torch.inf if edit.site.quantity == "scores" else 0.0)
    return x * value if edit.verb == "scale" else value.expand_as(x)


def moved(w: Tensor, source: Tensor, to: Tensor, share: float) -> Tensor:
    """Take `share` of the mass on source and give it to `to`; a row that sees no `to` keeps its mass."""
    open_to = to.expand_as(w)
    taken = torch.where(source, w * share, 0)
    have = torch.where(open_to, w, 0)
    even = open_to / open_to.sum(-1, keepdim=True).clamp(min=1)
    total = have.sum(-1, keepdim=True)
    part = torch.where(total > 0, have / total.clamp(min=1e-30), even.to(w.dtype))
    new = w - taken + taken.sum(-1, keepdim=True) * part
    return torch.where(open_to.any(-1, keepdim=True), new, w)


def observe(view: View, out: Tensor, touching: Any) -> None:
    """Write down what each observer of this site asked for, as it is after the edits."""
    for observer, records in touching.observers:
        heads, rows = heads_of(observer.site, view.q.shape[1]), rows_of(observer.site, view.new)
        if heads and (rows or observer.look == "last_row"):
            records.append((touching.layer, touching.step, look(view, out, observer, heads, rows, touching)))


def look(
    view: View, out: Tensor, observer: Observer, heads: list[int], rows: list[int], touching: Any
) -> Tensor:
    if observer.look == "z":
        return out[:, heads][:, :, rows].detach().clone()
    if observer.look == "last_row":
        return edited_weights(view, touching, slice(view.new - 1, view.new), heads)[:, :, 0].detach()
    parts = []
    for run, _ in cells([(heads, rows)]):
        for block in row_blocks(run.stop - run.start, view.q.shape[0] * len(heads) * view.stored):
            cut = slice(run.start + block.start, run.start + block.stop)
            weights = edited_weights(view, touching, cut, heads).detach()
            parts.append(summary(view, observer, weights, cut, heads))
    return torch.stack(parts).sum(0) if observer.look == "received" else torch.cat(parts, dim=2)


def summary(view: View, observer: Observer, w: Tensor, rows: slice, heads: list[int]) -> Tensor:
    if observer.look == "received":
        return w.sum(2)
    index = view.index if view.index.shape[1] == 1 else per_query_head(view.index, view.q.shape[1])[:, heads]
    index = index[:, :, None].expand(*w.shape[:2], 1, -1)
    if observer.look == "top1":
        return index.expand_as(w).gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)
    place = torch.arange(rows.start, rows.stop, device=w.device) + view.seen - view.new
    key = torch.as_tensor(observer.keys_of(place), device=w.device)  # true index of the key for each row
    return torch.where(index == key[:, None], w, 0).sum(-1)
