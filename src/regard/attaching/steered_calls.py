"""What a steering page is shown of one attention call, and streams that hide tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.attaching.actors import AttentionCall, seed_of
from regard.attaching.lazy_mask import LazyMask
from regard.attaching.step import has_role
from regard.attaching.unrotated import unrotated
from regard.core import Unsupported
from regard.ops import View, at_index, row_blocks
from regard.ops.steered import Arranged, Steered, Stream


def role_of(call: AttentionCall, name: str) -> Tensor:
    """[B, tokens] bool by true index."""
    if name not in call.labels:
        known = ", ".join(call.labels) or "none"
        raise KeyError(f"no role is called {name!r}; roles here: {known} (attach(roles=...) names them)")
    return has_role(call.labels[name])


def arranged_of(call: AttentionCall, view: View) -> Arranged:
    """The call as a page with an attention of its own sees it."""
    rotary = call.rotary
    if rotary is None or view.positions is None or call.layer is None:
        raise Unsupported(
            f"{call.where}: positions are read from a cache and rotary tables, and there are none (use_cache)"
        )
    if view.index.shape[1] > 1 or view.softcap is not None or view.sinks is not None or view.bias is not None:
        raise Unsupported(
            f"{call.where}: scores with a cap, sinks or a bias, or heads that hold different tokens"
        )
    if call.rule is None or not call.rule.model_causal:
        raise Unsupported(f"{call.where}: its mask is not plain causal")
    batch, index = view.q.shape[0], view.index[:, 0]
    owner = rotary.owners.get(call.layer, call.module)

    def labels(name: str) -> Tensor:
        if name not in call.labels:
            raise KeyError(f"no role is called {name!r}; roles here: {', '.join(call.labels) or 'none'}")
        label = call.labels[name]
        return at_index(label.long(), view.index)[:, 0].expand(batch, -1).masked_fill(~real, -1)

    real = view.hold()[:, 0].expand(batch, -1)
    asks = view.asking()
    places = at_index(view.positions, view.index)[:, 0].expand(batch, -1)
    return Arranged(
        q=view.q, k=view.k, v=view.v, scale=view.scale, q_at=places[:, -view.new :], k_at=places, real=real,
        asks=torch.ones(batch, view.new, dtype=torch.bool, device=index.device) if asks is None else asks,
        labels=labels, turn=lambda x, by: rotary.rotate(owner, x, by, queries=True),
        bare=lambda: unrotated("documents by importance", call, view.k, view.index),
    )  # fmt: skip


def last_row(call: AttentionCall, view: View) -> slice:
    """The newest query of each text: the last column; padding behind it is refused."""
    asking = view.asking()
    if asking is not None and not bool(asking[:, -1].all()):
        raise Unsupported(f"{call.where}: the newest token of each text stands last; pad on the left")
    return slice(view.new - 1, view.new)


def steered_of(steering: Any, call: AttentionCall, view: View, rows: slice) -> Steered:
    """The call as a page sees it, for these rows."""
    start, stop, _ = rows.indices(view.new)
    device, batch = view.q.device, view.q.shape[0]

    def role(name: str) -> Tensor:
        if view.index.shape[1] > 1:
            raise Unsupported(f"{call.where}: heads that hold different tokens")
        return at_index(role_of(call, name), view.index)[:, 0].expand(batch, -1) & (view.index[:, 0] >= 0)

    def row_role(name: str) -> Tensor:
        label = role_of(call, name)
        new = label[:, view.seen - view.new : view.seen]
        return new[:, start:stop].expand(batch, -1)

    notes = steering.notes.setdefault(call.site.layer, {})
    if call.layer is not None:
        notes = call.layer.memory.setdefault("steering", {}).setdefault(steering.name, {})
    at = Steered(
        layer=call.site.layer, layers=steering.context.layers_of_text, phase=call.phase, stream=steering.stream,
        tower=call.site.tower, rows=numbers(view, start, stop), role=role, row_role=row_role,
        visible=view.visible(rows), received=lambda: received(view), states=call.x, notes=notes,
        seed=seed_of(steering.config),
    )  # fmt: skip
    at.rows = at.rows.expand(batch, -1).to(device)
    at.keys = view.index[:, 0].expand(batch, -1)
    if call.site.tower == "vision":
        at.layers = steering.context.layers_of_tower
    if call.site.tower == "text" and not steering.makes_memory():
        at.memory = steering.memory_of()
    return at


def numbers(view: View, start: int, stop: int) -> Tensor:
    """[1|B, R] number of each query's token in its text; -1: padding."""
    if view.order is None:
        first = view.seen - view.new
        return torch.arange(first + start, first + stop, device=view.q.device)[None]
    order, asking = view.order[:, -view.new :], view.asking()
    order = order if asking is None else order.masked_fill(~asking, -1)
    return order[:, start:stop]


def received(view: View) -> Tensor:
    """[B, H, n] the mean weight of each stored key over the queries that see it, padding left out."""
    batch, heads = view.q.shape[:2]
    total = count = torch.zeros((), device=view.q.device)
    asking = view.asking()
    for rows in row_blocks(view.new, batch * heads * view.stored):
        w, seen = view.weights(rows), view.visible(rows)
        seen = torch.ones_like(w, dtype=torch.bool) if seen is None else seen.expand_as(w)
        if asking is not None:
            seen = seen & asking[:, None, rows, None]
        total, count = total + (w * seen).sum(2), count + seen.sum(2)
    return total / count.clamp(min=1)


def hidden_role(call: AttentionCall, stream: Stream, memory: Callable[[], Any]) -> AttentionCall:
    """The call in which no token but the hidden ones themselves sees the hidden tokens of a role."""
    if call.rule is None:
        raise Unsupported(
            f"{call.where}: no mask rule, or a 4-D mask of your own, beside a stream that hides tokens"
        )
    hidden = role_of(call, str(stream.hide)).clone()
    if stream.show is not None:
        shown = stream.show(memory())
        for row, keep in zip(hidden, shown, strict=True):
            tokens = row.nonzero().flatten()
            row[tokens[: len(keep)][keep[: len(tokens)]]] = False

    def narrowing(seen: Tensor, q: Tensor, index: Tensor) -> Tensor:
        gone = at_index(hidden, index)[:, :, None] & (index < hidden.shape[1])[:, :, None]
        asks = at_index(hidden, q[..., 0] if q.dim() == 4 else q)[..., None]
        return seen & ~(gone & ~asks)

    return replace(call, mask=LazyMask.of(replace(call.rule, narrowings=(*call.rule.narrowings, narrowing))))
