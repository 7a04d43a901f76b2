"""A sliding window whose sums come out too: what it leaves out can be added, query by query."""

import torch
from torch import Tensor

from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.placed import Placed
from regard.ops.softmax import at_least_float32


def latest_keys(at: Placed, block: int, width: int, since: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, E], lse [B, H, n]) of queries over their latest `width` keys, their own included.

    `at` is placed by blocks of `block`, which change the speed, never the result. With `since` [B], only queries in
    blocks that reach this place are answered; others give 0 and -inf.
    """
    if width == 0:
        out = at.v.new_zeros(*at.q.shape[:3], at.v.shape[3])
        return out, at_least_float32(at.q).new_full(at.q.shape[:3], -torch.inf)
    row, device = at.first(block) // block, at.q.device  # [B, 1, I, 1]
    most = (width + block - 2) // block + 1  # blocks of keys that a block of queries reaches
    back = torch.arange(min(most, at.columns(block)), device=device).flip(0)
    index = (row - back).clamp(min=-1)
    if since is not None:
        index = index.masked_fill((row + 1) * block <= since[:, None, None, None], -1)
    cut = max(
        0, -((block - 1 - width) // block)
    )  # so many blocks back, and further, some keys are too far away
    i = torch.arange(block, device=device)
    tiles = torch.arange(cut, most, device=device)[:, None, None] * block + i[:, None] - i < width
    tile = (back - cut).clamp(min=-1).expand_as(index)
    where = dict(causal=True, start=at.start, length=at.length, scale=at.q.shape[3] ** -0.5)
    return block_attention(at.q, at.k, at.v, Blocks(index, block, block, tile, tiles), **where)
