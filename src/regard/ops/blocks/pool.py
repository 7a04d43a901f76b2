"""What a block is like: the mean, the sum, the largest and the smallest of its tokens that are there."""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.softmax import at_least_float32


def in_blocks(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """[B, H, J, block, ...] of [B, H, M, ...], the last block filled up."""
    room = -x.shape[2] % block
    if room:
        tail = (0, 0) * (x.dim() - 3)
        x = F.pad(x, (*tail, 0, room), value=fill)
    return x.unflatten(2, (-1, block))


def hidden(x: Tensor, there: Tensor | None, fill: float) -> Tensor:
    """x [B, H, M, D] with `fill` in the place of tokens that are not there."""
    return x if there is None else x.masked_fill(~there[:, None, :, None], fill)


def block_sizes(x: Tensor, block: int, there: Tensor | None = None) -> Tensor:
    """[B|1, 1, J, 1] tokens that are there in each block of x [B, H, M, D]."""
    real = x.new_ones(1, x.shape[2], dtype=torch.bool) if there is None else there
    return in_blocks(real[:, None].long(), block).sum(3)[..., None]


def block_sum(x: Tensor, block: int, there: Tensor | None = None) -> Tensor:
    """[B, H, J, D] in float32 at least."""
    return in_blocks(hidden(at_least_float32(x), there, 0.0), block).sum(3)


def block_mean(x: Tensor, block: int, there: Tensor | None = None) -> Tensor:
    """[B, H, J, D] in float32 at least; zero for a block without tokens."""
    return block_sum(x, block, there) / block_sizes(x, block, there).clamp(min=1)


def block_max(x: Tensor, block: int, there: Tensor | None = None) -> Tensor:
    """[B, H, J, D], -inf for a block without tokens."""
    return in_blocks(hidden(at_least_float32(x), there, -torch.inf), block, -torch.inf).amax(3)


def block_min(x: Tensor, block: int, there: Tensor | None = None) -> Tensor:
    """[B, H, J, D], +inf for a block without tokens."""
    return in_blocks(hidden(at_least_float32(x), there, torch.inf), block, torch.inf).amin(3)
