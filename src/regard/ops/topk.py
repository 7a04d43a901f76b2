"""Choosing the best slots: stable, per row and head, with budgets that may differ between rows."""

import torch
from torch import Tensor

from regard.ops.softmax import at_least_float32


def best(score: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` highest of score [..., n]; ties go to the lower index; -inf is never taken. Bool [..., n].

    `count` is an int or an integer tensor broadcastable to score.shape[:-1].

    >>> best(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)
    tensor([False,  True,  True, False])
    """
    score = at_least_float32(score)
    count = torch.as_tensor(count, device=score.device).expand(score.shape[:-1]).clamp(max=score.shape[-1])
    most = int(count.max()) if count.numel() else 0
    if most <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    top = score.topk(most, dim=-1).values
    bar = top.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1))
    above, level = score > bar, score == bar
    room = (count - above.sum(-1)).unsqueeze(-1)
    return (above | (level & (level.cumsum(-1) <= room))) & (score > -torch.inf) & (count > 0).unsqueeze(-1)


def top_slots(score: Tensor, count: Tensor | int) -> Tensor:
    """Indices [..., m] of the `count` highest of score [..., n], in no order: what a step reads, decided each step.

    -inf is never taken; where fewer remain, or `count` (broadcastable to score.shape[:-1]) is smaller, -1 fills up.

    >>> top_slots(torch.tensor([[1.0, 3.0, 2.0], [5.0, -torch.inf, -torch.inf]]), 2).sort().values
    tensor([[ 1,  2],
            [-1,  0]])
    """
    most = count if isinstance(count, int) else int(count.max())
    uneven = not isinstance(count, int) and bool((count != most).any())
    top = score.topk(min(most, score.shape[-1]), dim=-1, sorted=uneven)
    slots = top.indices.masked_fill(top.values == -torch.inf, -1)
    if isinstance(count, int) or not uneven:
        return slots
    return slots.masked_fill(torch.arange(slots.shape[-1], device=slots.device) >= count.unsqueeze(-1), -1)


def by_row(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[B, ...] from `one` in these rows [B] bool of the batch, from `other` in the rest."""
    return torch.where(rows.view(-1, *[1] * (one.dim() - 1)), one, other)


def slots_of(alive: Tensor) -> Tensor:
    """Indices of the True places of alive [b, g, n], ascending, filled with -1 to the longest: [b, g, m]."""
    counts = alive.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    if bool((counts == most).all()):
        return alive.nonzero()[:, -1].view(*alive.shape[:-1], most)
    order = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return order.masked_fill(torch.arange(most, device=alive.device) >= counts.unsqueeze(-1), -1)


def gather_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of x [B, G, n, D] at slots [b, h, m] -> [B, max(G, h), m, D]; b is 1 or B, h is 1, G or a multiple of G.

    Whole rows are copied at once (an element-wise gather is 40 times slower on a CPU, docs/log.md). A slot of -1
    reads row 0: the caller hides it.
    """
    batch, groups, n, width = x.shape
    heads = max(groups, slots.shape[1])
    slots = slots.clamp(min=0)
    dense = x.stride() == (groups * x.stride(1), x.stride(1), width, 1) and not torch.is_grad_enabled()
    if not dense and slots.shape[:2] == (1, 1):
        return x.index_select(2, slots[0, 0])
    x = x if dense else x.contiguous()
    step = x.stride(1) // width
    flat = x.as_strided(((batch * groups - 1) * step + n, width), (width, 1))
    first = torch.arange(batch, device=x.device)[:, None] * groups
    first = (first + torch.arange(heads, device=x.device) // (heads // groups)) * step  # [B, heads]
    return flat.index_select(0, (first[..., None] + slots).reshape(-1)).view(batch, heads, -1, width)
