"""The fast path of a page that chooses blocks: tokens to their places, the choice, attention over what was chosen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.placed import Placed, placed
from regard.ops.clock import part
from regard.ops.pattern import all_unrotated, carried


def run_blocks(
    choose: Callable[..., Tensor | Blocks], q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call
) -> tuple[Tensor, Any, dict[str, Any]]:
    """(out, state, aux) of choose(at, cfg, call) -> Blocks, or a map [B|1, H|1, I, J] bool of what may be read.

    `at` are the tokens in their places. cfg has block_q and block_k, and BlockSettings. aux holds "blocks", what was
    read, a pair of lists without a row in common where a page gave lists and dense_last is set, and "lse" [B, H, N],
    the logarithm of the sum of e^score over it.
    """
    k, v, state = carried(k, v, call)
    at = placed(q, k, v, call.with_(unrotated=all_unrotated(call, state)), cfg.block_q)
    with part("estimate"), torch.no_grad():
        blocks, whole = chosen(choose, at, cfg, call)
    with part("attention"):
        lists = (blocks,) if whole is None else apart(blocks, whole)
        out, lse = attended(at, *lists)
        out = at.back(out)
    # two lists share no row: those of queries that the settings leave dense have blocks of their own
    return out.to(v.dtype), state, {"blocks": blocks if whole is None else lists, "lse": at.back(lse)}


def chosen(choose: Callable, at: Placed, cfg: Any, call: Call) -> tuple[Blocks, Blocks | None]:
    """(what the page chose, and what the settings leave dense, where this is not in its lists).

    A list is as long as its longest row, so that of a few dense rows in small blocks would be as large as the scores:
    beside a page's own lists they have one of larger blocks.
    """
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    if at.k.shape[2] <= cfg.dense_below:
        return Blocks.of_map(allowed, cfg.block_q, cfg.block_k), None
    found = choose(at, cfg, call)
    dense = at.last(cfg.block_q, cfg.dense_last) if cfg.dense_last else None
    if isinstance(found, Tensor):
        found = found if dense is None else found | dense
        return Blocks.of_map(found & allowed, cfg.block_q, cfg.block_k), None
    if dense is None:
        return found, None
    return found, Blocks.of_map(at.allowed(cfg.block_q, cfg.block_q) & dense, cfg.block_q, cfg.block_q)


def apart(blocks: Blocks, whole: Blocks) -> tuple[Blocks, Blocks]:
    """The list without the rows that the whole one has, and the whole one."""
    dense = (whole.index >= 0).any(-1, keepdim=True)
    index = blocks.index.masked_fill(dense, -1)
    return Blocks(index, blocks.block_q, blocks.block_k, blocks.tile, blocks.tiles), whole


def attended(at: Placed, blocks: Blocks, whole: Blocks | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) over what is read: rows that `whole` has any block of read that, the others `blocks`."""
    how = dict(scale=at.q.shape[-1] ** -0.5, causal=at.causal, start=at.start, length=at.length)
    out, lse = block_attention(at.q, at.k, at.v, blocks, **how)
    if whole is None:
        return out, lse
    all_out, all_lse = block_attention(at.q, at.k, at.v, whole, **how)
    dense = (whole.index >= 0).any(-1, keepdim=True)
    query = dense.repeat_interleave(whole.block_q, dim=2)[:, :, : lse.shape[2]]  # [B, 1, N, 1]
    return torch.where(query, all_out, out), torch.where(query[..., 0], all_lse, lse)
