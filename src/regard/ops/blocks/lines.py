"""Vertical and slash lines: how much of the attention of the last rows lies on each key, and at each distance."""

import torch
from torch import Tensor

from regard.ops.blocks.placed import Placed
from regard.ops.blocks.pool import block_mean
from regard.ops.softmax import scores


def last_weights(at: Placed, rows: int) -> tuple[Tensor, Tensor]:
    """(weights [B, H, rows, M], places [B, rows] of these queries) of the last queries of each text, causal.

    Where a text has fewer queries the first rows are zero, at place -1.
    """
    batch, n = len(at.q), at.q.shape[2]
    there = torch.ones(batch, n, dtype=torch.bool, device=at.q.device) if at.q_there is None else at.q_there
    count = there.sum(-1, keepdim=True)
    # queries lie together, and end where the text ends
    row = at.length[:, None] - at.start[:, None] - rows + torch.arange(rows, device=at.q.device)
    real = torch.arange(rows, device=at.q.device) >= rows - count
    row = row.masked_fill(~real, 0).clamp(0, max(n - 1, 0))
    q = at.q.gather(2, row[:, None, :, None].expand(-1, at.q.shape[1], -1, at.q.shape[-1]))
    place = torch.where(real, row + at.start[:, None], -1)
    s = scores(q, at.k, at.q.shape[-1] ** -0.5)
    seen = torch.arange(at.k.shape[2], device=at.q.device) <= place[..., None]
    return s.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0), place


def verticals(weights: Tensor) -> Tensor:
    """[B, H, M] mass on each key."""
    return weights.sum(2)


def slashes(weights: Tensor, place: Tensor) -> Tensor:
    """[B, H, M] mass at each distance from the query to the key, 0 for itself.

    >>> slashes(torch.tensor([[[[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]]]), torch.tensor([[1, 2]]))
    tensor([[[1.2500, 0.7500, 0.0000]]])
    """
    keys = torch.arange(weights.shape[3], device=weights.device)
    distance = (
        (place[..., None] - keys).clamp(min=0)[:, None].expand_as(weights)
    )  # what is not seen weighs nothing
    flat = weights.new_zeros(*weights.shape[:2], weights.shape[3])
    return flat.scatter_add(2, distance.flatten(2), weights.flatten(2))


def last_mean(at: Placed, rows: int) -> Tensor:
    """[B, H, 1, D] scaled mean of the last queries of each text."""
    place = at.start[:, None] + torch.arange(at.q.shape[2], device=at.q.device)
    last = (place >= at.length[:, None] - rows) & (place < at.length[:, None])
    last = last if at.q_there is None else last & at.q_there
    q = block_mean(at.q, max(at.q.shape[2], 1), last)
    return q * at.q.shape[-1] ** -0.5


def root_divergence(p: Tensor, t: Tensor) -> Tensor:
    """[...] square root of the Jensen-Shannon divergence of p and t [..., J]."""
    middle = ((p + t) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    both = torch.xlogy(p, p / middle).sum(-1) + torch.xlogy(t, t / middle).sum(-1)
    return (both / 2).clamp(min=0).sqrt()
