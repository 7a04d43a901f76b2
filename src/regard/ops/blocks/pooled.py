"""The attention map in blocks: the largest weight of each, which is what a gate over blocks is to foresee."""

import torch
from torch import Tensor

from regard.ops.blocks.placed import Placed
from regard.ops.blocks.pool import in_blocks
from regard.ops.softmax import per_query_head, scores

SCORES = 1 << 24  # numbers of the map at a time: bounds the memory, never changes the result


def largest_weights(at: Placed, block_q: int, block_k: int) -> Tensor:
    """[B, H, I, J] the largest softmax weight in each block of the map, in float32 at least.

    A block without a weight that may be read is zero.
    """
    parts, (batch, heads, n, width) = [], at.q.shape
    k, m = per_query_head(at.k, heads), at.k.shape[2]
    place_k = torch.arange(m, device=at.q.device)
    step = max(1, SCORES // (batch * heads * m * block_q)) * block_q
    for row in range(0, n, step):
        q = at.q[:, :, row : row + step]
        seen = (place_k < at.length[:, None])[:, None, None]
        if at.causal:
            place = at.start[:, None] + row + torch.arange(q.shape[2], device=q.device)
            seen = seen & (place_k <= place[..., None])[:, None]
        weights = scores(q, k, width**-0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        if at.q_there is not None:
            weights = weights * at.q_there[:, None, row : row + step, None]
        tall = in_blocks(weights, block_q).amax(3)
        parts.append(in_blocks(tall.mT, block_k).amax(3).mT)
    return torch.cat(parts, 2)
