"""HiP: each block of queries finds its keys by a tree search that halves segments and keeps the best halves.

    segments = top_k / block_k equal runs of key blocks
    until every segment is one block:
        halve each;  s(half) = max q·k over the block's asking queries q and the keys k of the half's first block
        keep as many halves as there were segments, those of the highest s
    o_i = softmax attention of i over the blocks that are left, the first keys (sinks) and the latest ones (local)

A left half begins where its segment did, so a round scores only the right ones: top_k keys for each query and round,
log2(N / top_k) rounds. It finds the best keys where neighbours score alike. Where they do not, the first block of a
half says nothing about the others, and much that is large is lost.

Worked by hand, blocks of one token, top_k = 1, local = 1: query 4 with q = 1 over keys 1, 9, 2, 0 before its own. Key 0
stands for {0, 1} and key 2 for {2, 3}: the search goes right, then left, and reads key 2; the 9 is never seen.

>>> import math, torch
>>> q, k = torch.ones(1, 1, 5, 1), torch.tensor([1.0, 9.0, 2.0, 0.0, 1.0]).view(1, 1, 5, 1)
>>> out, _ = reference(q, k, k, Config(block_q=1, block_k=1, top_k=1, sinks=0, local=1, stride=1), Call())
>>> w = math.exp(2) / (math.exp(2) + math.exp(1))
>>> math.isclose(out[0, 0, 4].item(), 2 * w + 1 * (1 - w), rel_tol=1e-6)
True
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import Blocks, BlockSettings, Placed, slow_attention
from regard.ops.blocks.tree import Keys, tree_search
from regard.ops.softmax import at_least_float32
from regard.ops.topk import gather_rows


@dataclass(frozen=True)
class Config(BlockSettings):
    block_k: int = 2
    top_k: int = 512  # tokens that the search finds
    sinks: int = 16  # first tokens, always read
    local: int = 256  # latest tokens that every query reads, itself included; both rounded up to blocks
    stride: int = 2  # every so many-th query of a block asks, and the last that is there

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, "top_k >= 1 token", top_k=self.top_k)
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)
        require(self.local >= 1, "local >= 1: a query reads itself", local=self.local)
        require(
            self.stride >= 1 and self.block_q % self.stride == 0,
            "stride >= 1 divides block_q",
            stride=self.stride,
        )


def searched(q: Tensor, k: Tensor, begin: int, end: int, cfg: Config) -> list[int]:
    """Blocks of [begin, end) that the asking queries q [n, D] of one block find among the keys k [M, D]."""
    count = math.ceil(cfg.top_k / cfg.block_k)
    if end - begin <= count:
        return list(range(begin, end))
    segments = list(pairwise(begin + (end - begin) * j // count for j in range(count + 1)))
    while max(b - a for a, b in segments) > 1:
        halves = [half for a, b in segments for half in ((a, (a + b) // 2), ((a + b) // 2, b))]
        scores = {
            a: float((q @ k[a * cfg.block_k : (a + 1) * cfg.block_k].mT).max()) for a, b in halves if a < b
        }
        best = sorted((half for half in halves if half[0] < half[1]), key=lambda half: -scores[half[0]])
        segments = sorted(best[:count])
    return [a for a, _ in segments]


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, block by block."""
    seen = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool)
    place = torch.arange(q.shape[1]) + start
    sinks = math.ceil(cfg.sinks / cfg.block_k)
    for block in range(start // cfg.block_q, int(place[-1]) // cfg.block_q + 1):
        rows = (place // cfg.block_q == block).nonzero()[:, 0]
        first, last = block * cfg.block_q, (block + 1) * cfg.block_q - 1
        local = max(0, first - cfg.local + 1) // cfg.block_k
        ask = [i for i in rows.tolist() if (i + start + 1) % cfg.stride == 0 or i == rows[-1]]
        for h in range(len(q)):
            found = searched(q[h, ask], k[h], sinks, local, cfg)
            for j in (*range(sinks), *found, *range(local, last // cfg.block_k + 1)):
                seen[h, rows, j * cfg.block_k : (j + 1) * cfg.block_k] = True
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def choose(at: Placed, cfg: Config, call: Call) -> Blocks:
    first, columns = at.first(cfg.block_q), at.columns(cfg.block_k)
    sinks = min(-(-cfg.sinks // cfg.block_k), columns)
    local = (first - cfg.local + 1).clamp(min=0) // cfg.block_k
    width = (local.clamp(max=columns) - sinks).clamp(min=0)
    count = min(-(-cfg.top_k // cfg.block_k), columns)
    found = tree_search(asking(at, cfg), Keys(at.k, at.q.shape[1], cfg.block_k), sinks, width, count)
    last = torch.minimum(
        (first + cfg.block_q - 1) // cfg.block_k, (at.length[:, None, None, None] - 1) // cfg.block_k
    )
    always = torch.arange(sinks, device=first.device)
    near = local.clamp(min=sinks) + torch.arange(
        (cfg.local + cfg.block_q - 2) // cfg.block_k + 2, device=first.device
    )
    parts = (always.expand(*first.shape[:3], -1), near)
    parts = [part.masked_fill(part > last, -1).expand(-1, found.shape[1], -1, -1) for part in parts]
    return Blocks(torch.cat([parts[0], found, parts[1]], dim=-1), cfg.block_q, cfg.block_k)


def asking(at: Placed, cfg: Config) -> Tensor:
    """[B, H, I, block_q / stride, D] queries that ask; in the place of one that is not there the last that is."""
    n, room = at.q.shape[2], -at.q.shape[2] % cfg.block_q
    row = torch.arange(n + room, device=at.q.device).view(-1, cfg.block_q)
    asked = row[:, cfg.stride - 1 :: cfg.stride]
    there = at.q.new_ones(1, n, dtype=torch.bool) if at.q_there is None else at.q_there
    there = F.pad(there, (0, room)).unflatten(1, (-1, cfg.block_q))
    last = row[:, -1:] - there.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    rows = torch.where(there[..., cfg.stride - 1 :: cfg.stride], asked, last)
    return gather_rows(at_least_float32(at.q), rows.clamp(max=n - 1).flatten(1)[:, None]).unflatten(
        2, (len(row), -1)
    )


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    knob=("top_k", (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**40)),
    patterns=("causal_self",),
    unsupported={
        "self": "its local window is that of a causal text",
        "cross": "its local window is that of a causal text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    test_settings=(
        {"top_k": 4, "block_q": 4, "block_k": 2, "sinks": 2, "local": 3},
        {"top_k": 3, "block_q": 8, "block_k": 1, "sinks": 0, "local": 1, "stride": 1},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="HiP attention",
        paper="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning, arXiv:2406.09827",
        year=2024,
        idea="halve segments of the text, keep the halves whose first keys fit best, until single blocks are left",
        cost="N · (top_k + sinks + local) products, and N · top_k · log2(N / top_k) to search",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("block_topk",),
        neutral={"top_k": 2**40},
        caveat="a half is judged by its first block, as in the paper's first version; the released v1.1 takes the "
        "middle one by default. The paper's maximum is over all queries of a block, the released code's over every "
        "second one (stride=2, the default here). There window and sinks are masks of tokens, here whole blocks. Other "
        "defaults are those of v1.1: top_k 512, blocks of 64 and 2, window 256, 16 sinks; its evaluations keep the "
        "first three layers dense (dense_layers). Its reference code rounds all segments down to one size, so that the "
        "last tokens of a text that does not divide are never searched; here segments cover it. A larger block_k is "
        "faster and finds less",
    ),
)
