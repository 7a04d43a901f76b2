"""Carrying out edits and observers: the touched heads and rows are recomputed, all others stay as they were."""

from typing import Any

import torch
from torch import Tensor

from regard.core import Edit, Observer
from regard.ops import View, mix, row_blocks


def rows_of(site: Any, new: int) -> list[int]:
    """Query rows of this forward that a site names; those it does not have are left out."""
    if site.rows is None:
        return list(range(new))
    return sorted({r % new for r in site.rows if -new <= r < new})


def heads_of(site: Any, heads: int) -> list[int]:
    return list(range(heads)) if site.heads is None else [h for h in site.heads if h < heads]


def key_columns(view: View, keys: Any, roles: dict[str, Tensor]) -> Tensor:
    """[B, 1|H, 1, n] bool: the stored slots that are these tokens of the text."""
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
        hit = torch.isin(view.index, wanted)
    hit = hit[:, :, None]
    return hit if hit.shape[1] == 1 else hit.repeat_interleave(view.q.shape[1] // hit.shape[1], 1)


def apply_edits(view: View, out: Tensor, touching: Any) -> Tensor:
    """out [B, H, N, E] with every edit of this site applied in the order given."""
    for edit, receipt in touching.edits:
        heads, rows = heads_of(edit.site, out.shape[1]), rows_of(edit.site, view.new)
        if not heads or not rows:
            continue
        if out is view.v or not touching.owned:
            out, touching.owned = out.clone(), True
        change = edit_z if edit.site.quantity == "z" else edit_attention
        if change(view, out, edit, heads, rows, touching.roles):
            receipt.fired += 1
    return out


def edit_z(view: View, out: Tensor, edit: Edit, heads: list[int], rows: list[int], roles: dict) -> bool:
    at = (slice(None), torch.tensor(heads)[:, None], torch.tensor(rows)[None])
    z = out[at]  # [B, heads, rows, E]
    if edit.verb == "block":
        new = torch.zeros_like(z)
    elif edit.verb == "scale":
        new = z * edit.value
    else:
        new = torch.as_tensor(edit.value, dtype=z.dtype, device=z.device).expand_as(z)
    out[at] = new
    return True


def edit_attention(
    view: View, out: Tensor, edit: Edit, heads: list[int], rows: list[int], roles: dict
) -> bool:
    """Recompute the rows from explicit weights, a contiguous run of rows at a time."""
    fired = False
    for start, stop in runs(rows):
        for block in row_blocks(stop - start, view.q.shape[0] * len(heads) * view.stored):
            cut = slice(start + block.start, start + block.stop)
            weights, hit = edited_weights(view, edit, heads, cut, roles)
            share = view.q.shape[1] // view.v.shape[1]
            out[:, heads, cut] = mix(weights, view.v[:, [h // share for h in heads]]).to(out.dtype)
            fired |= hit
    return fired


def edited_weights(view: View, edit: Edit, heads: list[int], rows: slice, roles: dict) -> tuple[Tensor, bool]:
    """[B, heads, rows, n] weights after the edit, and whether any key was meant."""
    keys = key_columns(view, edit.site.keys, roles)
    keys = keys if keys.shape[1] == 1 else keys[:, heads]
    if edit.site.quantity == "scores":
        s = view.scores(rows, heads)
        return view.normalise(changed_scores(s, keys, edit), rows, heads), bool(keys.any())
    w = view.weights(rows, heads)
    if edit.verb == "move":
        to = key_columns(view, edit.to, roles)
        return moved(w, keys, to if to.shape[1] == 1 else to[:, heads], edit.value, view.visible(rows)), bool(
            keys.any()
        )
    if edit.verb == "replace":
        value = torch.as_tensor(edit.value, dtype=w.dtype, device=w.device)
        return torch.where(keys, value.expand_as(w), w), bool(keys.any())
    factor = 0.0 if edit.verb == "block" else edit.value
    return torch.where(keys, w * factor, w), bool(keys.any())


def changed_scores(s: Tensor, keys: Tensor, edit: Edit) -> Tensor:
    if edit.verb == "block":
        return s.masked_fill(keys, -torch.inf)
    if edit.verb == "scale":
        return torch.where(keys, s * edit.value, s)
    return torch.where(keys, torch.as_tensor(edit.value, dtype=s.dtype, device=s.device).expand_as(s), s)


def moved(w: Tensor, source: Tensor, to: Tensor, share: float, seen: Tensor | None) -> Tensor:
    """Take `share` of the mass on source and give it to `to`; a row that sees no `to` keeps its mass."""
    open_to = to & (torch.ones_like(w, dtype=torch.bool) if seen is None else seen[..., : w.shape[-1]])
    taken = torch.where(source, w * share, 0)
    have = torch.where(open_to, w, 0)
    even = open_to / open_to.sum(-1, keepdim=True).clamp(min=1)
    total = have.sum(-1, keepdim=True)
    part = torch.where(total > 0, have / total.clamp(min=1e-30), even.to(w.dtype))
    new = w - taken + taken.sum(-1, keepdim=True) * part
    return torch.where(open_to.any(-1, keepdim=True), new, w)


def runs(rows: list[int]) -> list[tuple[int, int]]:
    """Consecutive rows as (start, stop): [1, 2, 3, 7] -> [(1, 4), (7, 8)]."""
    found: list[tuple[int, int]] = []
    for r in rows:
        if found and found[-1][1] == r:
            found[-1] = (found[-1][0], r + 1)
        else:
            found.append((r, r + 1))
    return found


def observe(view: View, out: Tensor, touching: Any) -> None:
    """Write down what each observer of this site asked for."""
    for observer, records in touching.observers:
        heads = heads_of(observer.site, view.q.shape[1])
        records.append((touching.layer, touching.step, look(view, out, observer, heads)))


def look(view: View, out: Tensor, observer: Observer, heads: list[int]) -> Tensor:
    rows = rows_of(observer.site, view.new)
    if observer.look == "z":
        return out[:, heads][:, :, rows].detach().clone()
    if observer.look == "last_row":
        return view.weights(slice(view.new - 1, view.new), heads)[:, :, 0].detach()
    start, stop = rows[0], rows[-1] + 1
    parts = []
    for block in row_blocks(stop - start, view.q.shape[0] * len(heads) * view.stored):
        cut = slice(start + block.start, start + block.stop)
        parts.append(summary(view, observer, view.weights(cut, heads).detach(), cut, heads))
    if observer.look == "received":
        return torch.stack(parts).sum(0)
    return torch.cat(parts, dim=2)[:, :, [r - start for r in rows]]


def summary(view: View, observer: Observer, w: Tensor, rows: slice, heads: list[int]) -> Tensor:
    index = view.index if view.index.shape[1] == 1 else view.index.repeat_interleave(
        view.q.shape[1] // view.index.shape[1], 1)[:, heads]  # fmt: skip
    index = index[:, :, None].expand(*w.shape[:2], 1, -1)
    if observer.look == "received":
        return w.sum(2)
    if observer.look == "top1":
        return index.expand_as(w).gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)
    place = torch.arange(rows.start, rows.stop, device=w.device) + view.seen - view.new
    key = torch.as_tensor(observer.keys_of(place), device=w.device)  # true index of the key for each row
    return torch.where(index == key[:, None], w, 0).sum(-1)
