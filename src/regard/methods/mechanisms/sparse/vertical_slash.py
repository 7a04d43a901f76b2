"""Vertical-slash: the last queries show which keys everybody reads, and at which distances everybody reads.

    w    = attention of the last `rows` queries
    V    = the `vertical` keys of largest Σ_i w_ij, the first `sinks` among them
    D    = the `slash` distances d of largest Σ_i w_{i, i-d}, the last `local` among them
    o_i  = softmax attention of i over the keys of V, and the blocks that the lines of D cross

In prompts most heads look at certain tokens from everywhere (verticals) and at certain distances (slashes); both show
in any few rows, and the last ones are those of the question.

Worked by hand: a last query at place 4 with weights 0.5, 0.2 and 0.3 on the keys 0, 1 and 2: with one vertical and one
slash, sinks and local 0, V = {0} and D = {4}.

>>> import torch
>>> w = torch.tensor([[[[0.5, 0.2, 0.3, 0.0, 0.0]]]])
>>> length = torch.tensor([[5]])
>>> largest(verticals(w), length, 1, 0), largest(slashes(w, length - 1), length, 1, 0)
(tensor([[[0]]]), tensor([[[4]]]))

Two tokens are too few to leave any out: scores 0 and log 3, values 0 and 4, the output 3.

>>> import math
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0, 1.0], [0.0, math.log(3)], [0.0, 4.0]))
>>> round(reference(q, k, v, Config(), Call())[0][0, 0, 1].item(), 6)
3.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried
from regard.ops.blocks import (
    WHOLE,
    Blocks,
    BlockSettings,
    Placed,
    block_attention,
    last_weights,
    placed,
    slashes,
    slow_attention,
    verticals,
)
from regard.ops.clock import part


@dataclass(frozen=True)
class Config(BlockSettings):
    vertical: int = 1000  # keys
    slash: int = 6096  # distances
    rows: int = 64  # of the last queries, which show the lines
    sinks: int = 30  # first keys that are always among the verticals
    local: int = 100  # shortest distances that are always among the slashes

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vertical >= self.sinks >= 0,
            "vertical >= sinks >= 0",
            vertical=self.vertical,
            sinks=self.sinks,
        )
        require(self.slash >= self.local >= 1, "slash >= local >= 1", slash=self.slash, local=self.local)
        require(self.rows >= 1, "rows >= 1", rows=self.rows)


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, line by line."""
    (heads, n, width), m = q.shape, k.shape[1]
    seen, place = torch.zeros(heads, n, m, dtype=torch.bool), torch.arange(n) + start
    for h in range(heads):
        key, distance = [0.0] * m, [0.0] * m
        for i in range(max(0, n - cfg.rows), n):
            for j, w in enumerate((q[h, i] @ k[h, : start + i + 1].T / width**0.5).softmax(0).tolist()):
                key[j] += w
                distance[start + i - j] += w
        for least, line in ((cfg.sinks, key), (cfg.local, distance)):
            line[:least] = [float("inf")] * len(line[:least])
        lines = [sorted(range(m), key=lambda j: -line[j])[:most]
                 for line, most in ((key, cfg.vertical), (distance, cfg.slash))]  # fmt: skip
        for block in sorted(set((place // cfg.block_q).tolist())):
            rows = place // cfg.block_q == block
            on_slash = {(i - d) // cfg.block_k for i in range(block * cfg.block_q, (block + 1) * cfg.block_q)
                       for d in lines[1] if i >= d}  # fmt: skip
            for j in on_slash:
                seen[h, rows, j * cfg.block_k : (j + 1) * cfg.block_k] = True
            seen[h, rows] = seen[h, rows].index_fill(1, torch.tensor(lines[0]), True)
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def largest(mass: Tensor, length: Tensor, count: int, always: int) -> Tensor:
    """[B, H, count] ascending indices of the largest of mass [B, H, M] within the length [B, 1]; then M."""
    at = torch.arange(mass.shape[-1], device=mass.device)
    mass = mass.masked_fill(at < always, torch.inf).masked_fill((at >= length)[:, None], -torch.inf)
    order = mass.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return order.masked_fill(order >= length[:, None], mass.shape[-1]).sort(-1).values


def crossed(at: Placed, distances: Tensor, cfg: Config) -> Tensor:
    """[B, H, I, J] bool: blocks that a line at one of these distances [B, H, S] crosses in a block of queries."""
    m, bq, bk = at.k.shape[2], cfg.block_q, cfg.block_k
    on = torch.zeros(*distances.shape[:2], m + 1, dtype=torch.long, device=distances.device)
    before = on.scatter(-1, distances.clamp(max=m), 1)[..., :m].cumsum(-1)
    before = torch.nn.functional.pad(before, (1, 0))  # distances below d
    first, key = at.first(bq), torch.arange(at.columns(bk), device=distances.device) * bk
    # between some query of the block and some key of the block lie the distances low .. high
    low, high = (first - key - bk + 1).clamp(0, m), (first + bq - key).clamp(0, m)
    shape = (*before.shape[:2], low.shape[2] * low.shape[3])
    ends = [before.gather(-1, x.expand(*before.shape[:2], -1, -1).reshape(shape)) for x in (low, high)]
    return (ends[1] > ends[0]).view(*before.shape[:2], low.shape[2], low.shape[3])


def chosen(at: Placed, cfg: Config) -> tuple[Blocks, Blocks]:
    """(blocks that slash lines cross, single keys of the verticals that lie in none of these)."""
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    if at.k.shape[2] <= cfg.dense_below:
        none = allowed.new_zeros(1, 1, allowed.shape[2], 0).long()
        return Blocks.of_map(allowed, cfg.block_q, cfg.block_k), Blocks(none, cfg.block_q, 1)
    weights, place = last_weights(at, cfg.rows)
    length = at.length[:, None]
    keys = largest(verticals(weights), length, cfg.vertical, cfg.sinks)
    blocks = crossed(at, largest(slashes(weights, place), length, cfg.slash, cfg.local), cfg)
    if cfg.dense_last:
        blocks = blocks | at.last(cfg.block_q, cfg.dense_last)
    blocks = blocks & allowed
    there = keys < at.k.shape[2]
    inside = (keys.clamp(max=at.k.shape[2] - 1) // cfg.block_k)[:, :, None].expand(
        -1, -1, blocks.shape[2], -1
    )
    alone = there[:, :, None] & ~blocks.gather(-1, inside)
    alone = alone & (keys[:, :, None] < at.first(cfg.block_q) + cfg.block_q)
    index = torch.where(alone, keys[:, :, None], -1)
    index = index.gather(-1, (~alone).to(torch.uint8).argsort(dim=-1, stable=True))
    return Blocks.of_map(blocks, cfg.block_q, cfg.block_k), Blocks(index, cfg.block_q, 1)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    k, v, state = carried(k, v, call)
    at = placed(q, k, v, call, cfg.block_q)
    with part("estimate"), torch.no_grad():
        lists = chosen(at, cfg)
    options = dict(scale=q.shape[-1] ** -0.5, causal=True, start=at.start, length=at.length)
    with part("attention"):
        (one, a), (other, b) = (block_attention(at.q, at.k, at.v, blocks, **options) for blocks in lists)
        lse = torch.logaddexp(a, b)
        shares = [(x - lse.nan_to_num(neginf=0.0)).exp()[..., None].to(v.dtype) for x in (a, b)]
        out = at.back(one * shares[0] + other * shares[1])
    return out.to(v.dtype), state, {"blocks": lists, "lse": at.back(lse)}


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("causal_self",),
    unsupported={
        "self": "its lines are those of a causal text",
        "cross": "its lines are those of a causal text",
        "causal_cross": "the last queries choose for all",
    },
    together=lambda cfg: WHOLE,
    test_settings=(
        {"vertical": 3, "slash": 2, "rows": 3, "sinks": 1, "local": 1, "block_q": 4, "block_k": 4},
        {"vertical": 2, "slash": 3, "rows": 5, "sinks": 0, "local": 2, "block_q": 8, "block_k": 2},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Vertical-slash",
        paper=(
            "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024), "
            "the vertical-slash pattern"
        ),
        year=2024,
        idea="the last queries show which keys, and which distances, all queries read",
        cost="rows · N products to choose, then what is read",
        state="every key and value so far",
        needs=("qkv",),
        neutral={"slash": 2**40},
        caveat=(
            "the last queries of a call choose for all before them, so outputs depend on them, and a prompt in "
            "parts is not the whole. Verticals are single keys, slash lines whole blocks that they cross, as in "
            "the official kernel. There each head of a model has its own numbers of lines, found offline; here "
            "all heads have those of the settings"
        ),
    ),
)
