"""Observers at work: what a model used at a site is recorded, as it is after the edits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.targets import cells, heads_of, rows_of
from regard.core import Observer
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
            heads, rows = heads_of(observer.site, view.q.shape[1]), rows_of(observer.site, view.new, view.fed)
            if heads and (rows or observer.statistic == "last_row"):
                observed = observation(call, view, out, observer, heads, rows)
                records.append((call.site.layer, call.step.number, observed))


def observation(
    call: AttentionCall, view: View, out: Tensor, observer: Observer, heads: list[int], rows: list[int]
) -> Tensor:
    if observer.statistic == "z":
        return out[:, heads][:, :, rows].detach().clone()
    if observer.statistic == "last_row":
        return call.weights(view, slice(view.new - 1, view.new), heads)[:, :, 0].detach()
    parts = []
    for run, _ in cells([(heads, rows)]):
        for block in row_blocks(run.stop - run.start, view.q.shape[0] * len(heads) * view.stored):
            cut = slice(run.start + block.start, run.start + block.stop)
            parts.append(summary(view, observer, call.weights(view, cut, heads).detach(), cut, heads))
    return torch.stack(parts).sum(0) if observer.statistic == "received" else torch.cat(parts, dim=2)


def summary(view: View, observer: Observer, w: Tensor, rows: slice, heads: list[int]) -> Tensor:
    if observer.statistic == "received":
        return w.sum(2)
    index = view.index if view.index.shape[1] == 1 else per_query_head(view.index, view.q.shape[1])[:, heads]
    index = index[:, :, None].expand(*w.shape[:2], 1, -1)
    if observer.statistic == "top1":
        return index.expand_as(w).gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)
    query = torch.arange(rows.start, rows.stop, device=w.device) + view.seen - view.new
    keys_of = present(observer.keys_of, "mass_at takes keys_of")
    # the true index of each row's key
    key = torch.as_tensor(keys_of(query), device=w.device)
    return torch.where(index == key[:, None], w, 0).sum(-1)
