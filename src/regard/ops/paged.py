"""Blocks of the text, of equally many tokens each, wherever their slots lie; and what a page remembers of every block.

Tokens are counted by their place among the real ones of the row: padding belongs to no block.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.softmax import per_query_head
from regard.ops.view import View


def slots_at(view: View, place: Tensor) -> Tensor:
    """[b, h, m] slots of the tokens at these places [b, h, m] among the real ones; -1: none is stored."""
    place = place.masked_fill((place < 0) | (place >= view.length()[:, None, None]), -1)
    if view.order is None and view.stored == view.seen:
        return place
    longest = int(view.length().max())
    held = view.rank().masked_fill(~view.hold(), longest)  # [1|B, 1|G, n]
    where = held.new_full((*held.shape[:2], longest + 1), -1)
    where = where.scatter(-1, held, torch.arange(view.stored, device=held.device).expand_as(held))
    where[..., -1] = -1
    where = per_query_head(where, max(where.shape[1], place.shape[1]))
    lead = [max(where.shape[i], place.shape[i]) for i in (0, 1)]
    place = place.masked_fill(place < 0, longest)
    return where.expand(*lead, -1).gather(-1, place.expand(*lead, -1))


def block_slots(view: View, blocks: Tensor, size: int, start: Tensor) -> Tensor:
    """[b, h, m · size] slots of the tokens of blocks [b, h, m], -1: none; the first begins at place `start` [1|B]."""
    first = blocks.masked_fill(blocks < 0, -view.seen - 1) * size + start[:, None, None]
    return slots_at(view, (first[..., None] + torch.arange(size, device=blocks.device)).flatten(2))


def oldest(view: View) -> Tensor:
    """[1|B] place of the first token that is still stored."""
    if view.window is None:
        return torch.zeros_like(view.length())
    return torch.where(view.hold(), view.rank(), view.seen).amin(-1).amin(-1)


@torch.no_grad()
def by_block(
    view: View, size: int, compute: Callable[[Tensor], Tensor], start: Tensor | None = None, back: int = 0
) -> tuple[Tensor, int]:
    """([B, h, P, W] what `compute` says of each block, the number of the first of them); remembered from step to step.

    compute  slots [b, 1, p · size], -1 where there is no token -> [B, h, p, W]
    start    [1|B] place of the token that begins block 0; None: the first of the text
    back     blocks are computed anew that hold a token of this step, or one of so many before it

    A layer that slides a window forgets the blocks that it has left behind. There is room for blocks to come, which
    say nothing yet; nor do those beyond the end of a row that is shorter than another.
    """
    memory = view.memory
    known = memory.get("blocks seen") == view.seen - view.tokens_fed
    if start is not None:
        known = known and bool((memory["blocks start"] == start).all())
        memory["blocks start"] = start
    start = torch.zeros_like(view.length()) if start is None else start
    gone = memory["blocks gone"] if known else 0
    back = back if known else view.seen
    rows = [x.tolist() for x in torch.broadcast_tensors(start, view.length(), view.fresh())]
    spans = [span(s, n, f, size, back, gone) for s, n, f in zip(*rows, strict=True)]
    most = max(stop - first for first, stop in spans)
    blocks = start.new_tensor([first for first, _ in spans])[:, None] + torch.arange(
        most, device=start.device
    )
    new = compute(block_slots(view, blocks[:, None], size, start))
    table = memory["blocks"] if known else new[:, :, :0]
    need = max(first for first, _ in spans) + most - gone
    if table.shape[2] < need or len(table) < len(new):
        table = F.pad(table.expand(len(new), -1, -1, -1), (0, 0, 0, need + need // 32 + 1 - table.shape[2]))
    at = (blocks - gone)[:, None, :, None].expand(len(new), *new.shape[1:])
    memory["blocks"] = table.scatter_(2, at, new)
    memory.update({"blocks gone": gone, "blocks seen": view.seen})
    if view.window is not None:
        left = max(0, int(((oldest(view) - start) // size).min()) - gone)
        memory.update({"blocks": memory["blocks"][:, :, left:], "blocks gone": gone + left})
    return memory["blocks"], memory["blocks gone"]


def span(start: int, length: int, fresh: int, size: int, back: int, gone: int) -> tuple[int, int]:
    """(first, one past the last) of the blocks of a row that have a token among its newest fresh + back.

    >>> span(0, 10, 1, size=4, back=0, gone=0), span(2, 10, 1, size=4, back=3, gone=0)
    ((2, 3), (1, 2))
    """
    first = max(gone, (length - fresh - back - start) // size)
    return first, max(first, -((start - length) // size))
