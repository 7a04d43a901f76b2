"""What block attention does, decided before it does it: rows of work that are alike go to one call of the kernel.

A row of work is one block of queries of one head in one row of the batch. Two rows are alike when they read as many
blocks, and the masks inside those that are not wholly seen are the same; then one mask serves them all. Under a causal
mask that is so for all rows that read as many blocks, since the mask on the diagonal does not depend on where it lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops.blocks.layout import Blocks

OPEN = 1 << 20  # stands for "no edge in this block"
MOST_RUNS = 256  # parts of work that are worth calls of their own; changes the speed, never the result


@dataclass(frozen=True)
class Work:
    """Rows of work that are alike.

    rows    [n] number of the row, (b·H + h)·I + i
    blocks  [n, r] number of the key block among all, (b·G + g)·J + j
    mask    [block_q, r·block_k] bool, True = attend; None: all is seen
    step    where each row reads r blocks beside each other, and its first lies so many after the row's before it: then
            keys are read where they lie, and no copy is made of them. None: they are gathered
    """

    rows: Tensor
    blocks: Tensor
    mask: Tensor | None
    step: int | None = None

    @property
    def at(self) -> slice | Tensor:
        """The rows, as a slice where they lie beside each other: then they are not copied."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else self.rows

    def cut(self, start: int, stop: int) -> "Work":
        return Work(self.rows[start:stop], self.blocks[start:stop], self.mask, self.step)


@dataclass(frozen=True)
class Plan:
    """The shapes that a schedule is made for: start [B] place of query 0, length [B] keys that are there."""

    batch: int
    heads: int
    groups: int
    columns: int
    start: Tensor
    length: Tensor
    causal: bool


def schedule(blocks: Blocks, plan: Plan) -> list[Work]:
    """All rows that read anything, alike ones together."""
    index, kinds = ordered(blocks, plan)
    b, h, i, r = index.shape
    codes, inverse = torch.unique(kinds.reshape(b * h * i, -1), dim=0, return_inverse=True)
    # heads and rows of the batch for which the lists do not differ stand beside each other
    inverse = inverse.view(b, h, i).expand(plan.batch, plan.heads, i).reshape(-1)
    rows = torch.argsort(inverse, stable=True)
    ends = torch.bincount(inverse, minlength=len(codes)).cumsum(0).tolist()
    first = first_block(plan, i)
    spread = index.expand(plan.batch, plan.heads, i, r).reshape(len(first), r)
    starts, works = [0, *ends[:-1]], []
    for code, start, end in zip(codes.tolist(), starts, ends, strict=True):
        reads = int(code[0]) + sum(kind >= 0 for kind in code[1:])
        if reads:
            mine = rows[start:end]
            read, mask = first[mine, None] + spread[mine, :reads], mask_of(code, blocks)
            works += in_runs(Work(mine, *ascending(read, mask)))
    return works


def ascending(read: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Blocks [n, r] and their mask, in the order in which they lie where that is one order for all rows."""
    apart = read - read[:, :1]
    if not bool((apart == apart[:1]).all()):
        return read, mask
    order = apart[0].argsort()
    if mask is not None:
        mask = mask.unflatten(1, (read.shape[1], -1))[:, order].flatten(1)
    return read[:, order], mask


def in_runs(work: Work) -> list[Work]:
    """The work, or its parts in which the blocks of a row lie beside each other and move on evenly from row to row."""
    first = work.blocks[:, :1]
    beside = torch.arange(work.blocks.shape[1], device=first.device)
    if not bool((work.blocks - first == beside).all()):
        return [work]
    steps = first[:, 0].diff()
    if not len(steps):
        return [Work(work.rows, work.blocks, work.mask, 0)]
    step = int(steps.mode().values)
    if step < 0:
        return [work]
    ends = [*((steps != step).nonzero()[:, 0] + 1).tolist(), len(first)]
    if len(ends) > MOST_RUNS:
        return [work]
    starts = [0, *ends[:-1]]
    return [
        Work(work.rows[a:b], work.blocks[a:b], work.mask, step) for a, b in zip(starts, ends, strict=True)
    ]


def first_block(plan: Plan, i: int) -> Tensor:
    """[B·H·I] number of the first key block of the KV head that a row of work reads."""
    head = torch.arange(plan.heads, device=plan.start.device) // (plan.heads // plan.groups)
    row = torch.arange(plan.batch, device=plan.start.device)[:, None] * plan.groups + head
    return (row * plan.columns)[..., None].expand(-1, -1, i).reshape(-1)


def ordered(blocks: Blocks, plan: Plan) -> tuple[Tensor, Tensor]:
    """(index [b, h, I, r] with the blocks that are wholly seen first, kinds [b, h, I, 1 + p]).

    kinds[..., 0] counts the blocks that are wholly seen; the others say what mask each further block has, -1 none.
    """
    index, bq, bk = blocks.index.long(), blocks.block_q, blocks.block_k
    shared = bool((plan.start == plan.start[0]).all()) and bool((plan.length == plan.length[0]).all())
    start, length = (t[:1] if shared else t for t in (plan.start, plan.length))
    lo = (start[:, None] + torch.arange(index.shape[2], device=index.device) * bq)[:, None, :, None]
    at = index * bk
    # how far the block's first key lies after the first query, and how many of its keys are there
    ahead = at - lo if plan.causal else torch.full_like(at, -OPEN)
    left = (length[:, None, None, None] - at).clamp(0, bk)
    tile = torch.full_like(index, -1) if blocks.tile is None else blocks.tile.long()
    index, ahead, left, tile = torch.broadcast_tensors(index, ahead, left, tile)
    seen = (index >= 0) & (ahead < bq) & (left > 0)
    whole = seen & (ahead <= 1 - bk) & (left == bk) & (tile < 0)
    order = torch.argsort(torch.where(whole, 0, torch.where(seen, 1, 2)), dim=-1, stable=True)
    index, ahead, left, tile, seen, whole = (
        t.gather(-1, order) for t in (index, ahead, left, tile, seen, whole)
    )
    cut = seen & ~whole
    most = int(cut.sum(-1).max()) if cut.numel() else 0
    count = whole.sum(-1, keepdim=True)
    if not most:
        return index, count
    # an edge that is behind every query of the block is no edge
    edge = torch.where(ahead <= 1 - bk, -bk, ahead) + bk  # 0 .. bq + bk - 1
    code = ((tile + 1) * (bq + bk) + edge) * (bk + 1) + left
    place = count + torch.arange(most, device=index.device)
    inside = place < index.shape[-1]
    place = place.clamp(max=index.shape[-1] - 1)
    kinds = code.gather(-1, place).masked_fill(~(cut.gather(-1, place) & inside), -1)
    return index, torch.cat([count, kinds], dim=-1)


def mask_of(code: list[int], blocks: Blocks) -> Tensor | None:
    """[block_q, r·block_k] bool of a kind of work: `code` is how many blocks are wholly seen, then kinds of others."""
    cut = [kind for kind in code[1:] if kind >= 0]
    if not cut:
        return None
    bq, bk, device = blocks.block_q, blocks.block_k, blocks.index.device
    i, j = torch.arange(bq, device=device)[:, None], torch.arange(bk, device=device)
    parts = [torch.ones(bq, code[0] * bk, dtype=torch.bool, device=device)]
    for kind in cut:
        tile, rest = divmod(kind, (bq + bk) * (bk + 1))
        edge, left = divmod(rest, bk + 1)
        part = (j < left) & (j + (edge - bk) <= i)
        parts.append(part if tile == 0 or blocks.tiles is None else part & blocks.tiles[tile - 1])
    return torch.cat(parts, dim=1)


def pieces(work: Work, rows: int) -> Iterator[Work]:
    """The work in pieces of so many rows, of one at least."""
    for start in range(0, len(work.rows), max(1, rows)):
        yield work.cut(start, start + max(1, rows))
