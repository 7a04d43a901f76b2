"""Attention where near queries and keys are sorted beside each other: blocks of the order, and draws of the rest."""

import math

import torch
from torch import Tensor

from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.merged import Part, merged
from regard.ops.blocks.whole import whole_attention
from regard.ops.clock import part
from regard.ops.softmax import at_least_float32
from regard.ops.topk import gather_rows

TOGETHER = 1 << 20  # numbers of queries that go together, all heads; changes the speed, never the result


def bucket_attention(
    q: Tensor, k: Tensor, v: Tensor, rank_q: Tensor, rank_k: Tensor, block: int, draws: Tensor, scale: float
) -> Part:
    """(out [B, H, n, E], lse [B, H, n]) in float32 at least, of q [B, H, n, D] on k, v [B, G, m, ...].

    rank     [B, H, n] and [B, G, m] where they belong; equal ones keep their order. A block of queries in this order
             reads the block of keys of the same number, of `block` keys
    draws    [H, s] places in the order of the keys, read with the weight m / s beside it, those of the own block not
    """
    heads, groups = q.shape[1], k.shape[1]
    if q.numel() <= TOGETHER or groups == 1:
        return sorted_attention(q, k, v, rank_q, rank_k, block, draws, scale)
    # one KV head after the other: what is sorted, read and merged stays in the cache
    share, parts = heads // groups, []
    for g in range(groups):
        mine, one = slice(g * share, (g + 1) * share), slice(g, g + 1)
        parts.append(
            sorted_attention(
                q[:, mine], k[:, one], v[:, one], rank_q[:, mine], rank_k[:, one], block, draws[mine], scale
            )
        )
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def sorted_attention(
    q: Tensor, k: Tensor, v: Tensor, rank_q: Tensor, rank_k: Tensor, block: int, draws: Tensor, scale: float
) -> Part:
    with part("estimate"), torch.no_grad():
        order_q, order_k = (rank.argsort(dim=-1, stable=True) for rank in (rank_q, rank_k))
        place = torch.arange(q.shape[2], device=q.device).expand_as(order_q)
        back = torch.empty_like(order_q).scatter_(-1, order_q, place)
    with part("attention"):
        q, k, v = gather_rows(q, order_q), gather_rows(k, order_k), gather_rows(v, order_k)
        out, lse = in_order(q, k, v, block, draws, scale)
        return gather_rows(out, back), lse.gather(-1, back)


def in_order(q: Tensor, k: Tensor, v: Tensor, block: int, draws: Tensor, scale: float) -> Part:
    n, m = q.shape[2], k.shape[2]
    size = -(-n // -(-m // block))
    near = own_blocks(q, k, v, size, block, scale)
    if not draws.shape[-1]:
        return near
    own = torch.arange(-(-n // size), device=q.device)[:, None]
    far = draws.to(q.device).sort(dim=-1).values[None, :, None]  # [1, H, 1, s]
    far = far.masked_fill(far // block == own, -1)  # [1, H, I, s]
    out, lse = block_attention(q, k, v, Blocks(far, size, 1), scale=scale)
    return merged(near, (at_least_float32(out), lse + math.log(m / draws.shape[-1])))


def own_blocks(q: Tensor, k: Tensor, v: Tensor, size: int, block: int, scale: float) -> Part:
    """Block I of `size` queries on block I of `block` keys."""
    rows = -(-q.shape[2] // size)
    if q.shape[1] == k.shape[1] and q.shape[2] == rows * size and k.shape[2] == rows * block:
        # blocks are heads then, and nothing is gathered
        parts = (t.unflatten(2, (rows, -1)).flatten(1, 2) for t in (q, k, v))
        out, lse = whole_attention(*parts, scale=scale)
        return out.unflatten(1, (-1, rows)).flatten(2, 3), lse.unflatten(1, (-1, rows)).flatten(2, 3)
    own = torch.arange(rows, device=q.device)[:, None]
    out, lse = block_attention(q, k, v, Blocks(own[None, None], size, block), scale=scale)
    return at_least_float32(out), lse
