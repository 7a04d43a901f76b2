"""Combiner: full attention as a conditional expectation; tokens near by directly, all others through their region.

    direct      j in Λ_i, the tokens of i's own block            score q_i·k_j / √D
    region Ω_r  every other block                                score q_i·k_Ω / √D, k_Ω pooled from its keys
    p(j|i)    = e^{score_j} / Z_i                                for j in Λ_i
    p(j|i)    = e^{score_r} / Z_i · softmax_j(q_Ω·k_j / √D)      for j in Ω_r, q_Ω pooled from its queries
    o_i       = Σ_j p(j|i) v_j,  where Z_i sums e^{score} over Λ_i and the regions

Every token that i may see has a positive weight, unlike in sparse attention. What a region gives, v_Ω = Σ_j p(j|Ω) v_j,
is the same for all who read it and is computed once: with blocks of √N tokens a query reads 2√N keys. Pooling takes the
largest of each channel, or the mean. In causal_self Λ_i ends at i, and regions are the blocks before i's own, all of
them complete; in self all blocks but its own. Blocks are counted in tokens that are there; a hidden token gives zero.

Worked by hand: blocks of two, scores of 0: query 2 reads its own value 2 and the region of 4 and 8, whose value is 6.

>>> import torch
>>> zero, v = torch.zeros(1, 1, 3, 1), torch.tensor([4.0, 8.0, 2.0]).view(1, 1, 3, 1)
>>> reference(zero, zero, v, Config(block=2), Call())[0][0, 0, 2].item()
4.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head
from regard.ops.blocks import in_blocks
from regard.ops.closed import Closed, carried_with_queries, closed, near_and_summed

REFUSED = "queries of another text have no block of their own among the keys, and none to pool for a region"
OWN_TEXT = "own text: as many queries as keys, since a region's query is pooled from its tokens'"
POOLS = ("max", "mean")


@dataclass(frozen=True)
class Config:
    block: int = 128  # tokens of a block; about √N
    pool: str = "max"  # what k_Ω and q_Ω hold of a region: the largest of each channel, or its "mean"

    def __post_init__(self) -> None:
        require(self.block >= 1, "block >= 1", block=self.block)
        require(self.pool in POOLS, f"pool is one of {POOLS}", pool=self.pool)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, heads, causal = q.shape[2], q.shape[1], call.pattern == "causal_self"
    before = call.initial_state or (k[:, :, :0], v[:, :, :0], q[:, :, :0])
    k, v, q = state = tuple(torch.cat(parts, dim=2) for parts in zip(before, (k, v, q), strict=True))
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    there = torch.ones_like(k_h[..., 0], dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    out = torch.zeros_like(v_h)
    for b, h in ((b, h) for b in range(len(q)) for h in range(heads)):
        tokens = there[b, h].nonzero()[:, 0]
        if len(tokens):
            weights = one_head(q_h[b, h, tokens], k_h[b, h, tokens], causal, cfg)
            out[b, h, tokens] = weights @ v_h[b, h, tokens]
    return out[:, :, -n:].to(v.dtype), state if causal else None


def one_head(q: Tensor, k: Tensor, causal: bool, cfg: Config) -> Tensor:
    """p(j|i) [T, T] of T tokens, all of them there."""
    scale = q.shape[-1] ** -0.5
    blocks = [slice(a, min(a + cfg.block, len(q))) for a in range(0, len(q), cfg.block)]
    pool = {"max": lambda t: t.max(0).values, "mean": lambda t: t.mean(0)}[cfg.pool]
    region_k = torch.stack([pool(k[j]) for j in blocks])  # k_Ω
    within = torch.cat([(k[j] @ pool(q[j]) * scale).softmax(0) for j in blocks])  # p(j|Ω)
    place, rows = torch.arange(len(q), device=q.device), []
    for i in range(len(q)):
        own, near = i // cfg.block, blocks[i // cfg.block]
        later = (place > i) & causal
        s = (k[near] @ q[i] * scale).masked_fill(later[near], -torch.inf)
        s_region = (region_k @ q[i] * scale).masked_fill(later[:: cfg.block], -torch.inf)
        p = torch.cat([s_region[:own], s, s_region[own + 1 :]]).softmax(0)
        before, p_near, after = p.split([own, len(s), len(s_region) - own - 1])
        of_region = torch.cat([before, torch.zeros_like(p[:1]), after])
        row = of_region[place // cfg.block] * within  # p(Ω|i) p(j|Ω)
        rows.append(torch.cat([row[: near.start], p_near, row[near.stop :]]))
    return torch.stack(rows)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, dtype, causal = q.shape[2], v.dtype, call.pattern == "causal_self"
    q, k, v, state = carried_with_queries(q, k, v, call)
    m, size = q.shape[2], min(cfg.block, q.shape[2])
    text = closed(call, n, m)
    k_c, v_c = text.keys(k), text.keys(v)

    def span(a: int, b: int) -> tuple[int, int, int]:
        end = (b - 1) // size + 1
        return a // size * size, b if causal else min(m, end * size), end if causal else -(-m // size)

    def sees(place: Tensor, token: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
        own = place // size
        if causal:
            return (token // size == own) & (token <= place), region < own
        return (token // size == own) & (token < text.count), (region != own) & (region * size < text.count)

    regions = summaries(text.keys(q), k_c, v_c, size, text, cfg)
    out = near_and_summed(text.queries(q[:, :, m - n :]), k_c, v_c, regions, text, span, sees)
    return text.opened(out).to(dtype), state


def summaries(q: Tensor, k: Tensor, v: Tensor, size: int, text: Closed, cfg: Config) -> tuple[Tensor, Tensor]:
    """k_Ω and v_Ω of all blocks, [B, H, J, ...], in float32 at least; of an empty one any numbers."""
    heads, m = q.shape[1], q.shape[2]
    q, k, v = (at_least_float32(per_query_head(in_blocks(t, size), heads)) for t in (q, k, v))
    place = torch.arange(q.shape[2] * size, device=q.device).view(1, 1, -1, size)
    count = text.count if isinstance(text.count, Tensor) else torch.tensor(m, device=q.device)
    # the first of an empty block stands for it
    seen = ((place < count) | (place % size == 0))[..., None]

    def pool(t: Tensor) -> Tensor:
        if cfg.pool == "max":
            return t.masked_fill(~seen, -torch.inf).amax(3, keepdim=True)
        return t.masked_fill(~seen, 0).sum(3, keepdim=True) / seen.sum(3, keepdim=True)

    s = pool(q) * q.shape[4] ** -0.5 @ k.mT  # [B, H, J, 1, size]
    p = s.masked_fill(~seen.mT, -torch.inf).softmax(-1)
    return pool(k)[:, :, :, 0], (p @ v)[:, :, :, 0]


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return n * (dims["heads"] * dims["key"] + dims["kv_heads"] * (dims["key"] + dims["value"]))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self", "causal_self"),
    unsupported=dict.fromkeys(("cross", "causal_cross"), REFUSED),
    test_settings=({"block": 3}, {"block": 4, "pool": "mean"}, {"block": 1}),
    state_size=state_size,
    exempt={
        "queries": "the queries of a block are pooled to the query of its region, whose answer others read"
    },
    card=Card(
        title="Combiner",
        paper="Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv:2107.05768",
        year=2021,
        idea="near tokens are attended to directly, the others through regions whose own attention is computed once",
        cost="O(N·(b + N/b)·(D + E)) time, O(N√N) with blocks of √N",
        state="every query, key and value: (H·D + G·(D + E))·n numbers for H query heads and G KV heads",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"block": 2**30},
        caveat=(
            "the fixed pattern alone: the paper's others, logsparse and axial, are not on this page. Its released code "
            "pools by max for language, as here, or by sum or mean, also after a learned layer, which the projections "
            "of q and k hold here; it asks for a length that is a multiple of the block"
        ),
    ),
)
