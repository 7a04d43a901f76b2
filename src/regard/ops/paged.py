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
    """[b, h, m · size] slots of the tokens of blocks [b, h, m], the first of which begins at place `start` [1|B]."""
    within = torch.arange(size, device=blocks.device)
    place = start[:, None, None, None] + blocks[..., None] * size + within
    return slots_at(view, place.masked_fill((blocks < 0)[..., None], -1).flatten(2))


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

    A layer that slides a window forgets the blocks that it has left behind. Blocks of a row that has none so far, or
    fewer than another, say nothing.
    """
    memory, length = view.memory, view.length()
    start = torch.zeros_like(length) if start is None else start
    known = memory.get("blocks seen") == view.seen - view.tokens_fed
    known = known and bool((memory["blocks start"] == start).all())
    gone = memory["blocks gone"] if known else 0
    changed = length - view.fresh() - back if known else torch.zeros_like(length)
    first = ((changed - start) // size).clamp(min=gone)
    most = int((-((start - length) // size) - first).max().clamp(min=0))
    blocks = first[:, None] + torch.arange(most, device=length.device)  # [1|B, most]
    new = compute(block_slots(view, blocks[:, None], size, start))
    room = int(first.max()) + most - gone
    old = memory["blocks"] if known else new[:, :, :0]
    if old.shape[2] < room or len(old) < len(new):
        old = F.pad(old.expand(len(new), -1, -1, -1), (0, 0, 0, max(0, room - old.shape[2])))
    at = (blocks - gone)[:, None, :, None].expand(len(new), *new.shape[1:])
    old = old.scatter_(2, at, new) if known else old.scatter(2, at, new)
    left = int(((oldest(view) - start) // size).min().clamp(min=gone)) - gone
    memory.update({"blocks": old[:, :, left:], "blocks gone": gone + left})
    memory.update({"blocks seen": view.seen, "blocks start": start})
    return memory["blocks"], memory["blocks gone"]
