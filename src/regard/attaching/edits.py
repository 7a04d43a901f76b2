"""Edits at work: the touched heads and rows are recomputed, all others stay as they were; receipts of what fired."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.targets import cells, heads_of, rows_of, seen_columns
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
            (r, heads_of(r.edit.site, out.shape[1]), rows_of(r.edit.site, view.new, view.fed))
            for r in self._of(call)
        ]
        targets = [(r, heads, rows) for r, heads, rows in targets if heads and rows]
        if not targets:
            return out
        out, self._met = out.clone(), {}
        self._recompute(call, view, out, [(h, rows) for r, h, rows in targets if r.edit.site.quantity != "z"])
        for receipt, heads, rows in targets:
            edit = receipt.edit
            if edit.site.quantity == "z":
                at = (slice(None), torch.tensor(heads)[:, None], torch.tensor(rows)[None])
                out[at] = changed(out[at], edit, value_at(edit, out, heads, rows, view))
                self._met[id(edit)] = set(heads)
            if self._met.get(id(edit)):
                receipt.note(call.site.layer, self._met[id(edit)])
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
            edit_heads = [h for h in heads_of(edit.site, view.q.shape[1]) if h in heads]
            edit_rows = [r for r in rows_of(edit.site, view.new, view.fed) if r in span]
            if not edit_heads or not edit_rows:
                continue
            at = (
                slice(None),
                torch.tensor([heads.index(h) for h in edit_heads])[:, None],
                torch.tensor([r - span.start for r in edit_rows])[None],
            )
            keys = seen_columns(view, edit.site.keys, call.labels, edit_heads, edit_rows)
            if edit.verb == "move":
                to = seen_columns(view, edit.to, call.labels, edit_heads, edit_rows)
                x[at] = moved(x[at], keys, to, edit.value)
                keys = keys & to.any(-1, keepdim=True)
            else:
                new = changed(x[at], edit, value_at(edit, x, edit_heads, edit_rows, view))
                x[at] = torch.where(keys, new, x[at])
            if bool(keys.any()):
                self._met.setdefault(id(edit), set()).update(edit_heads)
        return x


def value_at(edit: Edit, like: Tensor, heads: list[int], rows: list[int], view: View) -> Tensor | None:
    """The edit's value for these heads and rows: a number, or [B, heads, rows, width] of its tensor."""
    if edit.value is None:
        return None
    value = torch.as_tensor(edit.value, dtype=like.dtype, device=like.device)
    if value.dim() == 0:
        return value
    edit_heads = heads_of(edit.site, view.q.shape[1])
    edit_rows = rows_of(edit.site, view.new, view.fed)
    value = value.expand(like.shape[0], len(edit_heads), len(edit_rows), like.shape[-1])
    number = {r: i for i, r in enumerate(edit_rows)}
    return value[:, [edit_heads.index(h) for h in heads]][:, :, [number[r] for r in rows]]


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
