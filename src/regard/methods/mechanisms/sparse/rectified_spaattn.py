"""Rectified SpaAttn: what block-sparse attention leaves out comes back as the mean of a block, by its pooled share.

    P_IJ = softmax_J of mean(q in I)·mean(k in J) / √D + log |J|
    C    = the largest P_IJ that hold `share` of a row, and the blocks near I
    G    = blocks outside C where pooling says more than it may be wrong:
           |mean(q)·mean(k)| > |mean|q - mean(q)| · mean(k)| + |mean(q) · mean|k - mean(k)||
    o_i  = (1 - Σ_{J in G} P_IJ) · block-sparse attention of i over C  +  Σ_{J in G} P_IJ mean(v in J)

Softmax over chosen blocks alone gives them all of the weight, too much by what the others had. Where queries and keys
are constant inside each block the pooled shares are the true ones, and the rectified output is that of dense attention.

Worked by hand: two blocks of one token, scores 0 and log 3, values 4 and 8, only the second in C: P = (1/4, 3/4), the
output 3/4 · 8 + 1/4 · 4 = 7, as dense attention has it.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0, 1.0], [0.0, math.log(3)], [4.0, 8.0]))
>>> cfg = Config(share=0.6, block_q=1, block_k=1, rectify="all")
>>> round(reference(q, k, v, cfg, Call(pattern="self"))[0][0, 0, 1].item(), 6)
7.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried
from regard.ops.blocks import (
    Blocks,
    BlockSettings,
    Placed,
    block_attention,
    block_mean,
    block_sizes,
    by_text,
    causal_softmax,
    in_blocks,
    placed,
    top_mass,
)
from regard.ops.clock import part
from regard.ops.softmax import at_least_float32, per_query_head

RECTIFY = ("gain", "all", "none")


@dataclass(frozen=True)
class Config(BlockSettings):
    share: float = 0.5  # of the pooled attention that is read block by block; 1 reads all
    near: int = 0  # blocks on either side of a query's own that are read beside it
    rectify: str = (
        "gain"  # which blocks come back as means: where pooling gains, all that are not read, or none
    )
    block_q: int = 128
    block_k: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.share <= 1, "0 <= share <= 1", share=self.share)
        require(self.near >= 0, "near >= 0", near=self.near)
        require(self.rectify in RECTIFY, f"rectify is one of {RECTIFY}", rectify=self.rectify)
        require(
            self.block_q == self.block_k, "block_q = block_k: shares are of blocks of one size", config=self
        )


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    causal = call.pattern == "causal_self"

    def one(q: Tensor, k: Tensor, v: Tensor, start: int, cfg: Config) -> Tensor:
        return torch.stack([head(*x, start, cfg, causal) for x in zip(q, k, v, strict=True)])

    return by_text(one, q, k, v, cfg, call)


def head(q: Tensor, k: Tensor, v: Tensor, start: int, cfg: Config, causal: bool) -> Tensor:
    """[N, E] of one head of one text, block by block."""
    n, m, b, scale = len(q), len(k), cfg.block_k, q.shape[-1] ** -0.5
    place, out = torch.arange(n) + start, torch.zeros(n, v.shape[1], dtype=v.dtype)
    for block in sorted(set((place // b).tolist())):
        rows = place // b == block
        mean, away = q[rows].mean(0), (q[rows] - q[rows].mean(0)).abs().mean(0)
        keys = [k[j : j + b] for j in range(0, m, b) if not causal or j // b <= block]
        # of its own block a query sees half, on average
        seen = [len(x) if not causal or j < block else (len(x) + 1) / 2 for j, x in enumerate(keys)]
        sizes = torch.tensor(seen, dtype=q.dtype)
        share = (torch.stack([mean @ x.mean(0) for x in keys]) * scale + sizes.log()).softmax(0)
        dense = m <= cfg.dense_below or (cfg.dense_last and (block + 1) * b > start + n - cfg.dense_last)
        fixed, read = share.detach(), {j for j in range(len(keys)) if abs(j - block) <= cfg.near}
        for j in range(len(keys)):
            if dense or cfg.share >= 1 or float(fixed[fixed > fixed[j]].sum()) < cfg.share:
                read.add(j)
        back = [j for j in range(len(keys)) if j not in read and gains(mean, away, keys[j], cfg)]
        rest = 1 - sum((share[j] for j in back), share.new_zeros(()))
        sees = torch.tensor([j // b in read for j in range(m)]).expand(int(rows.sum()), m)
        sees = sees & (torch.arange(m) <= place[rows, None]) if causal else sees
        weights = (q[rows] @ k.T * scale).masked_fill(~sees, -torch.inf).softmax(-1)
        out[rows] = rest * (weights @ v) + sum(
            (share[j] * v[j * b : (j + 1) * b].mean(0) for j in back), 0 * v[0]
        )
    return out


def gains(mean: Tensor, away: Tensor, keys: Tensor, cfg: Config) -> bool:
    """Whether a block that is not read comes back: pooling says more than it may be wrong."""
    middle = keys.mean(0)
    wrong = (away @ middle).abs() + (mean @ (keys - middle).abs().mean(0)).abs()
    return cfg.rectify == "all" or (cfg.rectify == "gain" and bool((mean @ middle).abs() > wrong))


def pooled(at: Placed, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(share [B, H, I, J], whether pooling gains, allowed blocks)."""
    b, heads, allowed = cfg.block_k, at.q.shape[1], at.allowed(cfg.block_q, cfg.block_k)
    q, k = block_mean(at.q, b, at.q_there), block_mean(at.k, b, at.k_there)
    sizes = block_sizes(at.k, b, at.k_there).mT.to(q.dtype)  # [B, 1, 1, J]
    own = torch.arange(allowed.shape[-1], device=q.device) == at.first(b) // b
    sizes = torch.where(own, (sizes + 1) / 2, sizes) if at.causal else sizes
    product = q @ per_query_head(k, heads).mT
    share = causal_softmax(product * at.q.shape[-1] ** -0.5 + sizes.clamp(min=0.5).log(), allowed)
    spreads = [spread(x, mean, b, there) for x, mean, there in ((at.q, q, at.q_there), (at.k, k, at.k_there))]
    wrong = (spreads[0] @ per_query_head(k, heads).mT).abs() + (
        q @ per_query_head(spreads[1], heads).mT
    ).abs()
    return share, product.abs() > wrong, allowed


def spread(x: Tensor, mean: Tensor, block: int, there: Tensor | None) -> Tensor:
    """[B, H, J, D] mean distance of the tokens of a block from their mean, by channel."""
    away = (
        (in_blocks(at_least_float32(x), block) - mean[:, :, :, None]).abs().flatten(2, 3)[:, :, : x.shape[2]]
    )
    return block_mean(away, block, there)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    k, v, state = carried(k, v, call)
    at, b = placed(q, k, v, call, cfg.block_q), cfg.block_k
    with part("estimate"):
        share, gain, allowed = pooled(at, cfg)
        apart = (at.first(b) // b - torch.arange(allowed.shape[-1], device=q.device)).abs()
        read = (top_mass(share.detach(), allowed, cfg.share) | (apart <= cfg.near)) & allowed
        dense = at.last(b, cfg.dense_last) if cfg.dense_last else torch.zeros_like(allowed)
        read = read | ((dense | (at.k.shape[2] <= cfg.dense_below)) & allowed)
        back = (
            allowed & ~read & (gain if cfg.rectify == "gain" else torch.full_like(read, cfg.rectify == "all"))
        )
        blocks = Blocks.of_map(read, b, b)
    with part("attention"):
        where = dict(causal=at.causal, start=at.start, length=at.length)
        out, lse = block_attention(at.q, at.k, at.v, blocks, scale=q.shape[-1] ** -0.5, **where)
        given = share.masked_fill(~back, 0.0)
        means = per_query_head(block_mean(at.v, b, at.k_there), q.shape[1])
        rest, mean = 1 - given.sum(-1, keepdim=True), given @ means
        rest, mean = (x.repeat_interleave(b, 2)[:, :, : out.shape[2]] for x in (rest, mean))
        out = at.back((rest * out + mean).to(v.dtype))
    return out, state, {"blocks": blocks, "lse": at.back(lse)}


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self", "causal_self"),
    unsupported={
        "cross": "its own block is one of the same text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    together=lambda cfg: cfg.block_q,
    test_settings=(
        {"share": 0.3, "block_q": 4, "block_k": 4},
        {"share": 0.3, "rectify": "all", "block_q": 8, "block_k": 8},
    ),
    knob=("share", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Rectified SpaAttn",
        paper="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (2025)",
        year=2025,
        idea="blocks that are not read come back as their mean, by the share that pooling gives them",
        cost="what is read, and N² / block² to choose and to rectify",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("block_topk",),
        neutral={"share": 1.0},
        caveat=(
            "the method is for video, which is not causal; in causal_self a query's own block is read and "
            "counts half in the shares. Blocks are weighted by their tokens, so a last block that is cut is "
            "right; the official code pools zeros there, adds one block to the share, and reads neighbours on a "
            "grid of frames, which `near` is not"
        ),
    ),
)
