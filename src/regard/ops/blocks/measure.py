"""What a choice of blocks comes to: the share of the keys that is read, and of the attention that lies on them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.placed import placed


def kept_share(
    blocks: Blocks, queries: int, keys: int, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """[B|1, H|1] keys read by all queries over keys that they may see, whole blocks counted alike in both.

    `mask` [B, 1, 1, M] says which keys are there; under a causal mask the last query is that of the last key.
    """
    real = (
        torch.ones(1, keys, dtype=torch.bool, device=blocks.index.device) if mask is None else mask[:, 0, 0]
    )
    length = real.sum(-1)[:, None, None]
    before = real[:, : keys - queries].sum(-1)[:, None, None] if causal else 0 * length
    bq, bk = blocks.block_q, blocks.block_k
    first = before // bq * bq + torch.arange(blocks.index.shape[2], device=real.device) * bq  # [B, 1, I]
    seen = torch.minimum(first + bq, length) if causal else length.expand(-1, -1, blocks.index.shape[2])
    counted = first < length if causal else torch.ones_like(seen, dtype=torch.bool)
    read = torch.minimum((blocks.index + 1) * bk, seen[..., None]) - blocks.index * bk
    read = read.clamp(min=0).masked_fill(blocks.index < 0, 0).sum(-1)
    return (read * counted).sum(-1) / (seen * counted).sum(-1).clamp(min=1)


def read_by_head(
    lists: Sequence[Blocks], batch: int, heads: int, queries: int, keys: int, mask: Tensor | None = None
) -> Tensor:
    """[H] the share of keys read from lists that share no key, the mean over the rows of the batch."""
    shares = [kept_share(blocks, queries, keys, mask).expand(batch, heads) for blocks in lists]
    return torch.stack(shares).sum(0).mean(0)


def captured_mass(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """[B, H] mean over queries of the share of softmax attention that lies on what was read: e^(lse - lse of all).

    lse [B, H, N] is that over the keys that were read; -inf, of a query that saw nothing, is left out.
    """
    full = full_lse(q, k, mask, causal)
    seen = lse.isfinite() & full.isfinite()
    mass = (lse - full).nan_to_num(neginf=0.0, posinf=0.0).exp().clamp(max=1.0).masked_fill(~seen, 0.0)
    return mass.sum(-1) / seen.sum(-1).clamp(min=1)


def full_lse(
    q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = True, block: int = 256
) -> Tensor:
    """[B, H, N] logarithm of the sum of e^score over all keys that each query sees."""
    pattern = "causal_self" if causal else "cross"
    at = placed(q, k, k, Call(pattern=pattern, key_mask=None if mask is None else mask[:, :, 0]), block)
    blocks = Blocks.of_map(at.allowed(block, block), block, block)
    _, lse = block_attention(
        at.q,
        at.k,
        at.k,
        blocks,
        scale=q.shape[-1] ** -0.5,
        causal=at.causal,
        start=at.start,
        length=at.length,
    )
    return at.back(lse)
