"""Quest: the smallest and largest value of every channel bound what any query can find in a page of keys.

    u_iP = Σ_d max(q_id · min_P,d , q_id · max_P,d)     no key of page P has a larger product with q_i
    s_IP = max over the queries i of block I of u_iP
    I reads the pages of highest s_IP, `budget` tokens of them, and its own

A page that holds a key which some query needs cannot look poor, as it can by its mean: the bound is from above.

Worked by hand: q = (1, -1), a page with keys (0, 2) and (3, 1): u = max(0, 3) + max(-1, -2) = 2, and the largest of the
products is 2.

>>> import torch
>>> k = torch.tensor([[0.0, 2.0], [3.0, 1.0]]).view(1, 1, 2, 2)
>>> bounds(torch.tensor([[1.0, -1.0]]).view(1, 1, 1, 2), k.amin(2, True), k.amax(2, True))
tensor([[[[2.]]]])

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
from regard.ops.blocks import (
    BlockSettings,
    Placed,
    block_max,
    block_min,
    diagonal,
    hidden,
    in_blocks,
    slow_attention,
    top_blocks,
)
from regard.ops.softmax import at_least_float32, per_query_head

ROWS = 2048  # queries bounded at a time; bounds the memory, never changes the result


@dataclass(frozen=True)
class Config(BlockSettings):
    budget: int = 1024  # tokens, rounded up to pages
    block_k: int = 16  # tokens of a page
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.budget >= 1, "budget >= 1 token", budget=self.budget)


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, page by page."""
    n, m, bk = q.shape[1], k.shape[1], cfg.block_k
    seen, place = torch.zeros(len(q), n, m, dtype=torch.bool), torch.arange(n) + start
    for h in range(len(q)):
        for block in sorted(set((place // cfg.block_q).tolist())):
            rows, last = q[h, place // cfg.block_q == block], (block + 1) * cfg.block_q - 1
            bound = {}
            for page in range(-(-m // bk)):
                if page * bk <= last:
                    low, high = k[h, page * bk :][:bk].amin(0), k[h, page * bk :][:bk].amax(0)
                    bound[page] = max(float(torch.maximum(row * low, row * high).sum()) for row in rows)
            best = sorted(bound, key=lambda page: -bound[page])[: -(-cfg.budget // bk)]
            for page in {*best, *(p for p in bound if p * bk >= block * cfg.block_q)}:
                seen[h, place // cfg.block_q == block, page * bk : (page + 1) * bk] = True
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[B, H, n, J] the largest product that q [B, H, n, D] may have with keys between low and high [B, H, J, D]."""
    return q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    allowed, heads = at.allowed(cfg.block_q, cfg.block_k), at.q.shape[1]
    # a page without tokens is not allowed; zeros keep its bound finite
    low, high = (
        per_query_head(ends(at.k, cfg.block_k, at.k_there).nan_to_num(posinf=0.0, neginf=0.0), heads)
        for ends in (block_min, block_max)
    )
    q, step, parts = at_least_float32(at.q), max(cfg.block_q, ROWS // cfg.block_q * cfg.block_q), []
    for row in range(0, q.shape[2], step):
        cut = slice(row, row + step)
        bound = bounds(q[:, :, cut], low, high)
        bound = hidden(bound, None if at.q_there is None else at.q_there[:, cut], -torch.inf)
        parts.append(in_blocks(bound, cfg.block_q, -torch.inf).amax(3))
    own = diagonal(allowed, at.first(cfg.block_q), cfg.block_q, cfg.block_k)
    return top_blocks(torch.cat(parts, 2), allowed, -(-cfg.budget // cfg.block_k)) | own


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        "self": "its own page is that of a causal text",
        "cross": "its own page is that of a causal text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    test_settings=({"budget": 4, "block_q": 4, "block_k": 4}, {"budget": 3, "block_q": 8, "block_k": 2}),
    knob=("budget", (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 2**40)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Quest's page bounds, for prompts",
        paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024)",
        year=2024,
        idea="the extremes of a page's channels bound every product with its keys",
        cost="2 N² / block_k products to choose, then what is read",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("block_topk",),
        neutral={"budget": 2**40},
        caveat=(
            "the paper bounds pages for single tokens while decoding and leaves prompts and the first two layers "
            "dense; here a block of queries takes the largest of its bounds. A block reads its own pages beside "
            "the budget"
        ),
    ),
)
