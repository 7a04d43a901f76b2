"""Observers at work: what a model used at a site is recorded, as it is after the edits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.targets import Rows, cells, heads_of, rows_of
from regard.core import Observer, Site
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

    def _of(self, call: AttentionCall) -> list[tuple[Observer, list[Record]]]:
        at = call.site.layer, call.site.tower, call.phase
        return [(o, records) for o, records in self.observers if o.site.covers(*at)]

    def acts_on(self, call: AttentionCall) -> bool:
        return bool(self._of(call))

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        for observer, records in self._of(call):
            last = observer.statistic == "last_row"
            heads = heads_of(observer.site, view.q.shape[1])
            rows = rows_of(NEWEST if last else observer.site, view)
            if heads and rows.columns:
                observed = observation(call, view, out, observer, heads, rows)
                records.append((call.site.layer, call.step.number, observed))


NEWEST = Site(rows=-1)


def observation(
    call: AttentionCall, view: View, out: Tensor, observer: Observer, heads: list[int], rows: Rows
) -> Tensor:
    if observer.statistic == "z":
        return rows.picked(out[:, heads][:, :, rows.columns].detach().clone(), torch.nan)
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
