"""Edits at work: the touched heads and rows are recomputed, all others stay as they were; receipts of what fired."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.targets import Rows, cells, heads_of, rows_of, seen_columns
from regard.attaching.verbs import changed, edited, index, moved, spread, texts_of, value_at
from regard.core import Edit, NeverFired, Unsupported
from regard.core.edit import BY_KEY, STREAMS
from regard.ops import View, mix, row_blocks

INPUTS = ("q", "k", "v")


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
    """All edits of an attachment: on q, k and v first, then scores, weights and z, each kind in the order given.

    Those of a layer as a whole are carried out by hooks (streams.py); their receipts are here with the others.
    """

    name = "edits"
    reads_roles = True
    touches_rows = True

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.receipts = [Receipt(edit) for edit in edits]
        self.needs_rotary = any(edit.verb == "rotate" for edit in edits)
        self.rewrites = any(edit.site.quantity in INPUTS for edit in edits)
        # heads at which an edit, by id, met keys that are seen, in the call that is being edited
        self._met: dict[int, set[int]] = {}

    @property
    def changes_weights(self) -> bool:
        return any(r.edit.site.quantity in BY_KEY for r in self.receipts)

    def of_streams(self) -> list[Receipt]:
        return [r for r in self.receipts if r.edit.site.quantity in STREAMS]

    def check_fired(self, forwards: int) -> None:
        silent = [r.missing() for r in self.receipts if r.edit.required and r.missing()]
        if silent:
            raise NeverFired(f"never fired in {forwards} forwards: {'; '.join(silent)}")

    def _of(self, call: AttentionCall) -> list[Receipt]:
        at = call.site.layer, call.site.tower, call.phase
        mine = (r for r in self.receipts if r.edit.site.quantity not in STREAMS)
        return [r for r in mine if r.edit.site.covers(*at, roles=isinstance(r.edit.to, str))]

    def acts_on(self, call: AttentionCall) -> bool:
        return bool(self._of(call))

    def rewrite(self, call: AttentionCall, view: View) -> None:
        """Edits of q, k and v: what attention is given, and what the cache holds of the new tokens."""
        for receipt in self._of(call):
            edit = receipt.edit
            if edit.site.quantity not in INPUTS:
                continue
            x = getattr(call, edit.site.quantity)
            heads, rows = heads_of(edit.site, x.shape[1]), rows_of(edit.site, view)
            if heads and rows.columns:
                write_input(call, edit, heads, rows, view.asking())
                receipt.note(call.site.layer, heads)

    def edit(self, call: AttentionCall, view: View, out: Tensor) -> Tensor:
        """out [B, H, N, E] with the edits of this site."""
        targets = [
            (r, heads_of(r.edit.site, out.shape[1]), rows_of(r.edit.site, view))
            for r in self._of(call)
            if r.edit.site.quantity not in INPUTS
        ]
        targets = [(r, heads, rows) for r, heads, rows in targets if heads and rows.columns]
        if not targets:
            return out
        recomputed = [(r.edit, h, rows) for r, h, rows in targets if r.edit.site.quantity in BY_KEY]
        if recomputed:
            old, out, self._met = out, out.clone(), {}
            self._recompute(call, view, out, [(h, rows.columns) for _, h, rows in recomputed])
            if any(rows.number is not None or e.site.texts is not None for e, _, rows in recomputed):
                out = torch.where(touched(out, recomputed), out, old)
        for receipt, heads, rows in targets:
            if receipt.edit.site.quantity == "z":
                out = edited(out, receipt.edit, heads, rows, view.asking())
                met = set(heads)
            else:
                met = self._met.get(id(receipt.edit), set())
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
        edits = [r.edit for r in self._of(call) if r.edit.site.quantity in BY_KEY]
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
            texts = texts_of(edit, x.shape[0])
            at = index(texts, [heads.index(h) for h in edit_heads], [r - span.start for r in columns])
            keys = seen_columns(view, edit.site.keys, call.labels, edit_heads, columns)
            here = rows.here(columns)
            keys = of_texts(keys if here is None else keys & here, texts)
            if edit.verb == "move":
                to = of_texts(seen_columns(view, edit.to, call.labels, edit_heads, columns), texts)
                x[at] = moved(x[at], keys, to, edit.value)
                keys = keys & to.any(-1, keepdim=True)
            elif edit.verb == "uniform":
                x[at] = spread(x[at], keys)
            else:
                value = value_at(edit.value, edit, x, edit_heads, rows, columns, view.q.shape[1])
                x[at] = torch.where(keys, changed(x[at], edit, value), x[at])
            if bool(keys.any()):
                self._met.setdefault(id(edit), set()).update(edit_heads)
        return x


def of_texts(x: Tensor, texts: list[int]) -> Tensor:
    """x [1|B, ...] for these texts."""
    return x if x.shape[0] == 1 else x[texts]


def touched(out: Tensor, sites: list[tuple[Edit, list[int], Rows]]) -> Tensor:
    """[B, H, N, 1] bool: the texts, rows and heads that any of these sites names."""
    result = torch.zeros_like(out[..., :1], dtype=torch.bool)
    for edit, heads, rows in sites:
        texts = texts_of(edit, out.shape[0])
        at, here = index(texts, heads, rows.columns), rows.here(rows.columns)
        result[at] |= torch.ones_like(result[at]) if here is None else here[texts]
    return result


def write_input(call: AttentionCall, edit: Edit, heads: list[int], rows: Rows, real: Tensor | None) -> None:
    """Put the edited q, k or v of the new tokens in the place of what the call, and its cache, have."""
    name = edit.site.quantity
    if name == "q":
        call.q = new_input(call, call.q, edit, heads, rows, real)
        return
    new, whole = call.q.shape[2], getattr(call, name)
    refuse_elsewhere(call, name)
    old = whole[:, :, -new:]
    x = new_input(call, old, edit, heads, rows, real)
    whole = torch.cat([whole[:, :, :-new], x], 2)
    setattr(call, name, whole)
    if call.group is None:
        return
    buffer = "keys" if name == "k" else "values"
    stored = getattr(call.group, buffer)
    if whole.requires_grad or stored.requires_grad:
        setattr(call.group, buffer, whole)
    else:
        stored[:, :, call.group.n - new : call.group.n] = x


def refuse_elsewhere(call: AttentionCall, name: str) -> None:
    """Raise where the keys of this call are not those of its own new tokens, stored as they are."""
    new, seen, where = call.q.shape[2], getattr(call, name).shape[2], call.where
    if call.layer is None and seen != new:
        raise Unsupported(
            f"an edit of {name} at {where}: keys of another text, or of a cache that is no ledger"
        )
    if call.turn.nth or call.turn.of > 1:
        raise Unsupported(f"an edit of {name} at {where}: several layers read these keys")
    stored = None if call.group is None else call.group.k() if name == "k" else call.group.v()
    if stored is not None and stored.shape != getattr(call, name).shape:
        raise Unsupported(f"an edit of {name} at {where}: it is not stored as attention is given it")


def new_input(
    call: AttentionCall, x: Tensor, edit: Edit, heads: list[int], rows: Rows, real: Tensor | None
) -> Tensor:
    if edit.verb != "rotate":
        return edited(x, edit, heads, rows, real)
    if call.rotary is None:
        raise Unsupported(f"rotate at {call.where}: it has no rotary tables")
    by = torch.full((1, 1, x.shape[2]), int(edit.value), device=x.device)
    turned = call.rotary.rotate(call.module, x, by, queries=edit.site.quantity == "q")
    result, here = x.clone(), rows.here(rows.columns)
    texts = texts_of(edit, x.shape[0])
    at = index(texts, heads, rows.columns)
    result[at] = turned[at] if here is None else torch.where(here[texts], turned[at], x[at])
    return result
