"""What a cache policy reads of a step: chosen slots, keys moved to other positions, and what it selects by."""

from dataclasses import replace

from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.attaching.views import at_slots, visibility
from regard.core import Unsupported
from regard.core.errors import present
from regard.ops import View, gather_rows, per_query_head


def asking(call: AttentionCall, view: View) -> View:
    """What a page selects by: a layer that reads the keys of another asks with its last query, as it votes."""
    if call.turn.nth == 0 or view.new == 1:
        return view
    last = slice(view.new - 1, view.new)
    return replace(view, q=view.q[:, :, last], visible=lambda rows: view.visible(last))


def view_of_slots(call: AttentionCall, view: View, slots: Tensor, shift: Tensor | None) -> View:
    """The view restricted to slots [b, h, m]; `shift` moves the chosen keys to other positions."""
    k, v = gather_rows(view.k, slots), gather_rows(view.v, slots)
    if shift is not None:
        k = rotate(view, k, shift)
    chosen = slots.clamp(min=0)
    lead = [max(view.index.shape[i], slots.shape[i]) for i in (0, 1)]
    several = slots.shape[1] > view.index.shape[1] > 1
    spread = per_query_head(view.index, slots.shape[1]) if several else view.index
    index = spread.expand(*lead, -1).gather(-1, chosen.expand(*lead, -1)).masked_fill(slots < 0, -1)
    real = None if view.real is None and bool((slots >= 0).all()) else index >= 0
    if view.real is not None:
        real = present(call.rule, "only a mask rule knows of padding").real(index)
    if view.count is not None:
        raise Unsupported(f"{call.where}: selecting tokens under merged slots")
    bias = None if view.bias is None else at_slots(view.bias, slots, view.q.shape[1])
    visible = visibility(call.mask, view.q, index, real)
    return replace(view, cached_scores=None, k=k, v=v, index=index, real=real, visible=visible, bias=bias)


def rotate_first(view: View, by: Tensor | None, call: AttentionCall) -> None:
    """Rotate the first keys of a group in place; the keys as they first were are kept, so errors never add up."""
    group = call.slots
    if by is None:
        group.restore()
        return
    s = by.shape[-1]
    if group.origin is not None and group.origin.shape[2] != s:
        group.restore()
    origin = group.keys[:, :, :s].clone() if group.origin is None else group.origin
    turned = rotate(view, origin, by)
    if view.k.data_ptr() != group.keys.data_ptr():
        raise Unsupported(
            f"{call.where} expands its keys after they were stored, so they cannot be moved in place"
        )
    group.origin, call.ledger.compressed = origin, True
    group.keys[:, :, :s] = turned
    view.cached_scores = view.cached_weights = view.cached_received = None


def rotate(view: View, keys: Tensor, by: Tensor) -> Tensor:
    return present(view.rotate, "a page that moves keys is given the model's rotation")(keys, by)
