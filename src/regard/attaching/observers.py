"""Observers at work: what a model used at a site is recorded, as it is after the edits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.function import native
from regard.attaching.targets import Rows, cells, heads_of, rows_of
from regard.core import Observer, Site, Unsupported, require
from regard.core.edit import BY_KEY, STREAMS, int_tuple
from regard.core.errors import present
from regard.ops import View, per_query_head, row_blocks

Record = tuple[int, int, Tensor]  # layer, step, what was observed


class Observers(Actor):
    """All observers of an attachment, and their records by name."""

    name = "observers"
    reads_roles = True
    touches_rows = True

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers: list[tuple[Observer, list[Record]]] = [(o, []) for o in observers]
        self.records = {o.name or o.statistic: records for o, records in self.observers}

    def of_streams(self) -> list[tuple[Observer, list[Record]]]:
        return [(o, records) for o, records in self.observers if o.site.quantity in STREAMS]

    def _of(self, call: AttentionCall) -> list[tuple[Observer, list[Record]]]:
        at = call.site.layer, call.site.tower, call.phase
        mine = ((o, records) for o, records in self.observers if o.site.quantity not in STREAMS)
        return [(o, records) for o, records in mine if o.site.covers(*at)]

    def acts_on(self, call: AttentionCall) -> bool:
        return call.step.stream == "main" and bool(self._of(call))

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        for observer, records in self._of(call):
            last = observer.statistic == "last_row"
            of_keys = observer.statistic == "value" and observer.site.quantity in ("k", "v")
            heads = heads_of(observer.site, (view.k if of_keys else view.q).shape[1])
            rows = rows_of(NEWEST if last else observer.site, view)
            if heads and rows.columns:
                observed = observation(call, view, out, observer, heads, rows)
                texts = int_tuple(observer.site.texts)
                observed = observed if texts is None else observed[list(texts)]
                records.append((call.site.layer, call.step.number, observed))


NEWEST = Site(rows=-1)


def observation(
    call: AttentionCall, view: View, out: Tensor, observer: Observer, heads: list[int], rows: Rows
) -> Tensor:
    if observer.statistic == "value" and observer.site.quantity in BY_KEY:
        return values_by_key(call, view, observer, heads, rows)
    if observer.statistic == "z_if":
        return rows.picked(z_if(call, observer)[:, heads][:, :, rows.columns], torch.nan)
    if observer.statistic in ("z", "value"):
        quantity = "z" if observer.statistic == "z" else observer.site.quantity
        x = new_tokens(call, quantity) if quantity != "z" else out
        if observer.site.heads is not None or observer.site.rows is not None:
            x = rows.picked(x[:, heads][:, :, rows.columns], torch.nan)
        return x if observer.live else x.detach().clone()
    parts = []
    for run, _ in cells([(heads, rows.columns)]):
        for block in row_blocks(run.stop - run.start, view.q.shape[0] * len(heads) * view.stored):
            cut = slice(run.start + block.start, run.start + block.stop)
            w = call.weights(view, cut, heads).detach()
            if observer.statistic == "received":
                parts.append(asked_weights(view, rows, w, cut).sum(2))
            else:
                parts.append(
                    w if observer.statistic == "last_row" else summary(view, observer, w, cut, heads)
                )
    if observer.statistic == "received":
        return torch.stack(parts).sum(0)
    seen = rows.picked(torch.cat(parts, dim=2), -1 if observer.statistic == "top1" else torch.nan)
    return seen[:, :, 0] if observer.statistic == "last_row" else seen


@torch.no_grad()
def z_if(call: AttentionCall, observer: Observer) -> Tensor:
    """[B, H, N, E] the model's own attention over this call with q, k or v given; nothing else of the model is run."""
    if call.layer is not None and (not call.layer.plain or call.layer.seen != call.q.shape[2]):
        raise Unsupported(f"z_if at {call.where}: what would be is asked of a whole text at once")
    name = str(observer.site.quantity)
    old, given = getattr(call, name), observer.given.to(getattr(call, name))
    require(
        given.shape == old.shape, f"z_if is given {name} of this call", given=given.shape, wanted=old.shape
    )
    q, k, v = (given if name == n else getattr(call, n) for n in ("q", "k", "v"))
    return native(replace(call, q=q, k=k, v=v))[0].transpose(1, 2)


def new_tokens(call: AttentionCall, quantity: str) -> Tensor:
    """[B, heads, N, width] q, k or v of this forward's tokens."""
    x = getattr(call, quantity)
    if quantity == "q":
        return x
    new = call.q.shape[2]
    if call.layer is None and x.shape[2] != new:
        raise Unsupported(
            f"{quantity} at {call.where}: its keys are of another text, or of a cache that is no ledger"
        )
    return x if x.shape[2] == new else x[:, :, -new:]


def values_by_key(
    call: AttentionCall, view: View, observer: Observer, heads: list[int], rows: Rows
) -> Tensor:
    """[B, heads, rows, n] scores (-inf where a row does not see a slot) or weights of the rows of a site."""
    parts = []
    for run, _ in cells([(heads, rows.columns)]):
        if observer.site.quantity == "weights":
            parts.append(call.weights(view, run, heads))
            continue
        x, seen = view.scores(run, heads), view.visible(run)
        seen = seen if seen is None or seen.shape[1] == 1 else seen[:, heads]
        parts.append(x if seen is None else x.masked_fill(~seen, -torch.inf))
    x = rows.picked(torch.cat(parts, 2), torch.nan)
    return x if observer.live else x.detach().clone()


def asked_weights(view: View, rows: Rows, w: Tensor, cut: slice) -> Tensor:
    """Weights [B, heads, rows, n] of these columns, zero where a text's column is not of the site, or padding."""
    here, asking = rows.here(range(cut.start, cut.stop)), view.asking()
    if here is None and asking is not None:
        here = asking[:, None, cut, None]
    return w if here is None else w * here


def summary(view: View, observer: Observer, w: Tensor, rows: slice, heads: list[int]) -> Tensor:
    """Of weights [B, heads, rows, n]: the top key's token, the weight on a certain one, or on spans of them."""
    if observer.statistic == "spans":
        return torch.stack([(w * slots).sum(-1) for slots in slots_of_spans(view, observer, heads)], -1)
    rank = view.rank()
    rank = rank if rank.shape[1] == 1 else per_query_head(rank, view.q.shape[1])[:, heads]
    rank = rank[:, :, None].expand(*w.shape[:2], 1, -1)
    if observer.statistic == "top1":
        return rank.expand_as(w).gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)
    keys_of = present(observer.keys_of, "mass_at takes keys_of")
    asked = (
        torch.arange(view.seen - view.new, view.seen, device=w.device)[None]
        if view.order is None
        else view.order
    )
    # the number of each row's token, and of the key that it is asked about: [1|B, 1, rows, 1]
    texts = [torch.as_tensor(keys_of(q), device=w.device) for q in asked[:, -view.new :][:, rows]]
    key = torch.stack(texts)[:, None, :, None]
    seen = view.hold()[:, :, None] if view.real is not None else torch.ones_like(rank, dtype=torch.bool)
    seen = seen if seen.shape[1] in (1, w.shape[1]) else per_query_head(seen, view.q.shape[1])[:, heads]
    return torch.where((rank == key) & seen, w, 0).sum(-1)


def slots_of_spans(view: View, observer: Observer, heads: list[int]) -> Iterator[Tensor]:
    """[1|B, 1|heads, 1, n] bool: where the tokens of each span are stored; padding among them weighs nothing."""
    rank = view.rank()[:, :, None]
    for first, past in observer.spans:
        slots = (rank >= first) & (rank < past)
        yield slots if slots.shape[1] == 1 else per_query_head(slots, view.q.shape[1])[:, heads]
