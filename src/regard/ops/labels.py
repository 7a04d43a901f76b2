"""What a page finds out of a prompt or computes of a key once, and remembers for as long as the text goes on."""

from collections.abc import Callable

import torch
from torch import Tensor

from regard.ops.topk import by_row
from regard.ops.view import View

SLACK = 16  # room for at least so many tokens where a table of labels grows; beyond, an eighth of its length


@torch.no_grad()
def labels(view: View, make: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, h, n, d] what `make` gives of every stored key, [B, K, m, D] -> [B, h, m, d]: asked once, then remembered.

    Slots are in the order of the text: what a sliding layer drops lies before the rest, and what is new behind it.
    """
    memory = view.memory
    new = int((view.index[0, 0] >= view.seen - view.tokens_fed).sum())
    end, old = memory.get("labels end", 0), view.stored - new
    known = memory.get("labels seen") == view.seen - view.tokens_fed and old <= end
    old = old if known else 0
    fresh = make(view.k[:, :, old:])
    if not known or end + new > memory["labels"].shape[2] or len(memory["labels"]) < len(fresh):
        wide = fresh.new_zeros(*fresh.shape[:2], view.stored + max(SLACK, view.stored // 8), fresh.shape[3])
        if known:
            wide[:, :, :old] = memory["labels"][:, :, end - old : end]
        memory["labels"], end = wide, old
    stop = end + fresh.shape[2]
    memory["labels"][:, :, end:stop] = fresh
    memory.update({"labels end": stop, "labels seen": view.seen})
    return memory["labels"][:, :, stop - view.stored : stop]


@torch.no_grad()
def learned(view: View, name: str, learn: Callable[[], Tensor]) -> Tensor:
    """[B, ...] what `learn` finds in the first tokens of each row, which are those of its prompt; kept from then on."""
    known = view.memory.get(name)
    first = view.length() == view.fresh()
    if known is None:
        view.memory[name] = learn()
    elif bool(first.any()):
        view.memory[name] = by_row(first.expand(len(view.q)), learn(), known)
    return view.memory[name]


def report_reading(view: View, slots: Tensor, beside: Tensor) -> None:
    """Count as read the keys and values of these slots [b, h, m], and what they were chosen by."""
    heads = max(slots.shape[1], view.k.shape[1])
    width = view.k.shape[-1] * view.k.element_size() + view.v.shape[-1] * view.v.element_size()
    view.report_bytes(beside.numel() * beside.element_size() + len(view.k) * heads * slots.shape[-1] * width)
