"""Block top-k: each block of queries reads the blocks of keys whose mean fits its own mean best.

    s_IJ = mean(q in I) · mean(k in J)          over the blocks J that I may see
    o_i  = softmax attention of i over the keys of the top_k blocks of highest s_IJ, and of its own block

Means cost N² / block² products where attention costs N²: at blocks of 64 the choice is 1/4096 of the scores. What is
read is exact; what is not read is gone.

Worked by hand, blocks of one token, top_k = 1: query 2 with q = 1 over keys 3, 1, 2 reads key 0 beside its own.

>>> import math, torch
>>> q, k = torch.ones(1, 1, 3, 1), torch.tensor([3.0, 1.0, 2.0]).view(1, 1, 3, 1)
>>> out, _ = reference(q, k, k, Config(block_q=1, block_k=1, top_k=1), Call())
>>> w = math.exp(3) / (math.exp(3) + math.exp(2))
>>> math.isclose(out[0, 0, 2].item(), 3 * w + 2 * (1 - w), rel_tol=1e-6)
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import BlockSettings, Placed, block_mean, diagonal, slow_attention, top_blocks
from regard.ops.softmax import per_query_head


@dataclass(frozen=True)
class Config(BlockSettings):
    top_k: int = 100  # blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, "top_k >= 1 block", top_k=self.top_k)


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, block by block."""
    n, m = q.shape[1], k.shape[1]
    columns = [(j, min(j + cfg.block_k, m)) for j in range(0, m, cfg.block_k)]
    seen = torch.zeros(len(q), n, m, dtype=torch.bool)
    place = torch.arange(n) + start
    for block in range(start // cfg.block_q, (start + n - 1) // cfg.block_q + 1):
        rows = (place // cfg.block_q == block).nonzero()[:, 0]
        last = (block + 1) * cfg.block_q - 1
        for h in range(len(q)):
            fits = [float(q[h, rows].mean(0) @ k[h, a:b].mean(0)) for a, b in columns if a <= last]
            ranked = sorted(range(len(fits)), key=lambda j: -fits[j])[: cfg.top_k]
            own = [j for j, (a, b) in enumerate(columns) if a <= last and b > block * cfg.block_q]
            for j in {*ranked, *own}:
                seen[h, rows, columns[j][0] : columns[j][1]] = True
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    q = block_mean(at.q, cfg.block_q, at.q_there)
    k = per_query_head(block_mean(at.k, cfg.block_k, at.k_there), q.shape[1])
    own = diagonal(allowed, at.first(cfg.block_q), cfg.block_q, cfg.block_k)
    return top_blocks(q @ k.mT, allowed, cfg.top_k) | own


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        "self": "its own block is that of a causal text",
        "cross": "its own block is that of a causal text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    test_settings=({"top_k": 2, "block_q": 4, "block_k": 4}, {"top_k": 1, "block_q": 8, "block_k": 2}),
    knob=("top_k", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 2**40)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Block top-k",
        paper=(
            "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024), "
            "the block-sparse pattern"
        ),
        year=2024,
        idea="the means of two blocks say whether the one should read the other",
        cost="N · top_k · block products, and N² / block² to choose",
        state="every key and value so far",
        needs=("qkv",),
        neutral={"top_k": 2**40},
        caveat="the queries of a block choose together: an output depends on later queries of its own block",
    ),
)
