"""Edits at work: the touched heads and rows are recomputed, all others stay as they were; receipts of what fired."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.targets import Rows, cells, heads_of, rows_of, seen_columns
from regard.core import Edit, NeverFired
from regard.core.errors import present
from regard.ops import View, mix, row_blocks


@dataclass
class Receipt:
    """How often an edit changed something, and at which of the layers and heads that it names."""

    edit: Edit
    fired: int = 0
    layers: set[int] = field(default_factory=set)
    heads: set[int] = field(default_factory=set)

    def note(self, layer: int, heads: Iterable[int]) -> None:
        self.fired += 1
        self.layers.add(layer)
        self.heads.update(heads)

    def missing(self) -> str:
        """What the edit names and never met, in words; empty if nothing."""
        if self.fired == 0:
            return str(self.edit)
        layers = set(self.edit.site.layers or ()) - self.layers
        heads = set(self.edit.site.heads or ()) - self.heads
        named = [f"{name} {sorted(left)}" for name, left in (("layers", layers), ("heads", heads)) if left]
        return f"{self.edit} in {' and '.join(named)}" if named else ""


class Edits(Actor):
    """All edits of an attachment: on scores first, then on weights, then on z, each kind in the order given."""

    name = "edits"
    reads_roles = True
    touches_rows = True

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.receipts = [Receipt(edit) for edit in edits]
        # heads at which an edit, by id, met keys that are seen, in the call that is being edited
        self._met: dict[int, set[int]] = {}

    def check_fired(self, forwards: int) -> None:
        silent = [r.missing() for r in self.receipts if r.missing()]
        if silent:
            raise NeverFired(f"never fired in {forwards} forwards: {'; '.join(silent)}")

    def _of(self, call: AttentionCall) -> list[Receipt]:
        at = call.site.layer, call.site.tower, call.phase
        return [r for r in self.receipts if r.edit.site.covers(*at)]

    def acts_on(self, call: AttentionCall) -> bool:
        return bool(self._of(call))

    def edit(self, call: AttentionCall, view: View, out: Tensor) -> Tensor:
        """out [B, H, N, E] with the edits of this site."""
        targets = [
            (r, heads_of(r.edit.site, out.shape[1]), rows_of(r.edit.site, view)) for r in self._of(call)
        ]
        targets = [(r, heads, rows) for r, heads, rows in targets if heads and rows.columns]
        if not targets:
            return out
        old, out, self._met = out, out.clone(), {}
        recomputed = [(h, rows) for r, h, rows in targets if r.edit.site.quantity != "z"]
        self._recompute(call, view, out, [(h, rows.columns) for h, rows in recomputed])
        if any(rows.number is not None for _, rows in recomputed):
            out = torch.where(touched(out, recomputed), out, old)
        for receipt, heads, rows in targets:
            edit, met = receipt.edit, self._met.get(id(receipt.edit))
            if edit.site.quantity == "z":
                at = (slice(None), torch.tensor(heads)[:, None], torch.tensor(rows.columns)[None])
                here, new = rows.here(rows.columns), changed(out[at], edit, value_at(edit, out, heads, rows))
                out[at] = new if here is None else torch.where(here, new, out[at])
                met = set(heads)
            if met:
                receipt.note(call.site.layer, met)
        return out

    def _recompute(
        self, call: AttentionCall, view: View, out: Tensor, sites: list[tuple[list[int], list[int]]]
    ) -> None:
        """Write the rows of these (heads, rows) anew, in place."""
        share = view.q.shape[1] // view.v.shape[1]
        for rows, heads in cells(sites):
            for block in row_blocks(rows.stop - rows.start, view.q.shape[0] * len(heads) * view.stored):
                cut = slice(rows.start + block.start, rows.start + block.stop)
                weights = call.weights(view, cut, heads)
                out[:, heads, cut] = mix(weights, view.v[:, [h // share for h in heads]]).to(out.dtype)

    def weights(self, call: AttentionCall, view: View, rows: slice, heads: list[int] | None) -> Tensor | None:
        """[B, heads, rows, n] those of the view, after every edit that covers them."""
        edits = [r.edit for r in self._of(call) if r.edit.site.quantity != "z"]
        if not edits:
            return None
        heads = list(range(view.q.shape[1])) if heads is None else heads
        span = range(view.new)[rows]
        x = view.scores(rows, heads)
        x = self._edited(x, call, view, [e for e in edits if e.site.quantity == "scores"], heads, span)
        x = view.normalise(x, rows, heads)
        return self._edited(x, call, view, [e for e in edits if e.site.quantity == "weights"], heads, span)

    def _edited(
        self, x: Tensor, call: AttentionCall, view: View, edits: list[Edit], heads: list[int], span: range
    ) -> Tensor:
        """x [B, heads, rows, n] with these edits where they cover it."""
        x = x.clone() if edits else x
        for edit in edits:
            rows = rows_of(edit.site, view)
            edit_heads = [h for h in heads_of(edit.site, view.q.shape[1]) if h in heads]
            columns = [r for r in rows.columns if r in span]
            if not edit_heads or not columns:
                continue
            at = (
                slice(None),
                torch.tensor([heads.index(h) for h in edit_heads])[:, None],
                torch.tensor([r - span.start for r in columns])[None],
            )
            keys, here = (
                seen_columns(view, edit.site.keys, call.labels, edit_heads, columns),
                rows.here(columns),
            )
            keys = keys if here is None else keys & here
            if edit.verb == "move":
                to = seen_columns(view, edit.to, call.labels, edit_heads, columns)
                x[at] = moved(x[at], keys, to, edit.value)
                keys = keys & to.any(-1, keepdim=True)
            else:
                new = changed(x[at], edit, value_at(edit, x, edit_heads, rows, columns, view.q.shape[1]))
                x[at] = torch.where(keys, new, x[at])
            if bool(keys.any()):
                self._met.setdefault(id(edit), set()).update(edit_heads)
        return x


def touched(out: Tensor, sites: list[tuple[list[int], Rows]]) -> Tensor:
    """[B, H, N, 1] bool: the rows and heads that any of these sites names, text by text."""
    result = torch.zeros_like(out[..., :1], dtype=torch.bool)
    for heads, rows in sites:
        at = (slice(None), torch.tensor(heads)[:, None], torch.tensor(rows.columns)[None])
        here = rows.here(rows.columns)
        result[at] |= torch.ones_like(result[at]) if here is None else here
    return result


def value_at(
    edit: Edit, like: Tensor, heads: list[int], rows: Rows, columns: list[int] | None = None, of: int = 0
) -> Tensor | None:
    """The edit's value for these heads and columns: a number, or [B, heads, columns, width] of its tensor.

    `of`: how many heads the layer has, if `like` has not all of them. A tensor has an entry for each row of the site.
    """
    if edit.value is None:
        return None
    value = torch.as_tensor(edit.value, dtype=like.dtype, device=like.device)
    if value.dim() == 0:
        return value
    columns = rows.columns if columns is None else columns
    edit_heads, at = heads_of(edit.site, of or like.shape[1]), [rows.columns.index(c) for c in columns]
    value = value.expand(like.shape[0], len(edit_heads), rows.count(), like.shape[-1])
    value = value[:, [edit_heads.index(h) for h in heads]]
    if rows.number is None:
        return value[:, :, at]
    return value.take_along_dim(rows.number[:, at].clamp(min=0)[:, None, :, None], 2)


def changed(x: Tensor, edit: Edit, value: Tensor | None) -> Tensor:
    """x after replace, scale or block."""
    if edit.verb == "block":
        return torch.full_like(x, -torch.inf if edit.site.quantity == "scores" else 0.0)
    value = present(value, f"{edit.verb} takes a value")
    return x * value if edit.verb == "scale" else value.expand_as(x)


def moved(w: Tensor, source: Tensor, to: Tensor, share: float) -> Tensor:
    """Take `share` of the mass on source and give it to `to`; a row that sees no `to` keeps its mass."""
    visible = to.expand_as(w)
    taken = torch.where(source, w * share, 0)
    mass = torch.where(visible, w, 0)
    even = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    total = mass.sum(-1, keepdim=True)
    part = torch.where(total > 0, mass / total.clamp(min=1e-30), even.to(w.dtype))
    new = w - taken + taken.sum(-1, keepdim=True) * part
    return torch.where(visible.any(-1, keepdim=True), new, w)
