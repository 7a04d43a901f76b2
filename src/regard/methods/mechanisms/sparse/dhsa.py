"""DHSA: chunks of unequal length, scored as wholes, read token by token as far as a budget goes.

    κ_c  = mean(k in c) · √|c|        so that a chunk's score has one variance, whatever its length
    χ_I  = mean(q in I) · √|I|
    s_Ic = χ_I · κ_c, the score of every token of c
    I reads its `local` latest keys, and of the others the `budget` tokens of highest score

The mean of many random keys is small and their sum is large: by means short chunks win, by sums long ones. The root of
the length is between them, and on noise the choice does not know how long a chunk is.

Worked by hand: keys 1, 1, 1, 1 in one chunk of four: mean 1, sum 4, and 1 · √4 = 2.

>>> import torch
>>> [chunk_keys(torch.ones(1, 1, 4, 1), torch.tensor([0]), torch.tensor([4]), pool).item() for pool in POOLS]
[2.0, 1.0, 4.0]

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
from regard.ops.blocks import Blocks, BlockSettings, Placed, block_sizes, block_sum, hidden, slow_attention
from regard.ops.softmax import at_least_float32

POOLS = {"sqrt": 0.5, "mean": 1.0, "sum": 0.0}  # the power of the length by which a sum of keys is divided


@dataclass(frozen=True)
class Config(BlockSettings):
    budget: int = 1024  # tokens beside the latest
    local: int = 64  # latest keys of a block of queries that are always read
    chunk: int = 16  # tokens of a chunk, where no borders are given
    borders: tuple[int, ...] = ()  # places at which chunks begin, beside 0
    pool: str = "sqrt"  # what the sum of a chunk's keys is divided by: √|c|, |c| ("mean") or nothing ("sum")
    share_heads: bool = True  # all heads read one set of tokens, chosen by the mean of heads
    block_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.budget >= 0 and self.local >= 1 and self.chunk >= 1,
            "budget >= 0, local >= 1, chunk >= 1",
            config=self,
        )
        require(self.pool in POOLS, f"pool is one of {', '.join(POOLS)}", pool=self.pool)
        rising = all(a < b for a, b in zip((0, *self.borders), self.borders))
        require(rising, "borders ascend from above 0", borders=self.borders)
        require(self.block_k == 1, "block_k = 1: tokens are read one by one", block_k=self.block_k)


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, chunk by chunk."""
    n, m = q.shape[1], k.shape[1]
    firsts = [0, *(b for b in cfg.borders if b < m)] if cfg.borders else list(range(0, m, cfg.chunk))
    place, seen = torch.arange(n) + start, torch.zeros(len(q), n, m, dtype=torch.bool)
    qs, ks = (x.mean(0, keepdim=True) if cfg.share_heads else x for x in (q, k))
    for h in range(len(q)):
        for block in sorted(set((place // cfg.block_q).tolist())):
            rows, end = place // cfg.block_q == block, min((block + 1) * cfg.block_q, m)
            query, score = qs[h % len(qs), rows], {}
            for a, b in zip(firsts, [*firsts[1:], m]):
                keys = ks[h % len(ks), a : min(b, end)]
                if len(keys):
                    key = keys.sum(0) / len(keys) ** POOLS[cfg.pool]
                    score |= dict.fromkeys(
                        range(a, a + len(keys)), float(query.sum(0) @ key) / len(query) ** 0.5
                    )
            early = [j for j in score if j < end - cfg.local]
            best = sorted(early, key=lambda j: (-score[j], j))[: cfg.budget]
            for j in {*best, *range(max(0, end - cfg.local), end)}:
                seen[h, rows, j] = True
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def chunk_keys(k: Tensor, first: Tensor, end: Tensor, pool: str) -> Tensor:
    """[B, H, C, D] keys of the chunks first .. end of k [B, H, M, D], first and end [C] or [B, C] places.

    An empty chunk is zero.
    """
    before = torch.nn.functional.pad(k.cumsum(2), (0, 0, 1, 0))
    ends = [
        x.expand(len(k), -1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]) for x in (first, end)
    ]
    size = (ends[1] - ends[0]).clamp(min=1).to(k.dtype)
    return (before.gather(2, ends[1]) - before.gather(2, ends[0])) / size ** POOLS[pool]


def choose(at: Placed, cfg: Config, call: Call) -> Blocks:
    q = (
        block_sum(at.q, cfg.block_q, at.q_there)
        / block_sizes(at.q, cfg.block_q, at.q_there).clamp(min=1) ** 0.5
    )
    k = hidden(at_least_float32(at.k), at.k_there, 0.0)
    if cfg.share_heads:
        q, k = (x.mean(1, keepdim=True) for x in (q, k))
    k = k if k.shape[1] in (1, q.shape[1]) else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    m, device = at.k.shape[2], q.device
    places = [0, *(b for b in cfg.borders if b < m)] if cfg.borders else list(range(0, m, cfg.chunk))
    first = torch.tensor(places, device=device)
    last = torch.tensor([*places[1:], m], device=device)
    end = torch.minimum(at.first(cfg.block_q)[:, 0, :, 0] + cfg.block_q, at.length[:, None])  # [B, I]
    early = (end - cfg.local).clamp(min=0)
    score = q @ chunk_keys(k, first, torch.minimum(last, at.length[:, None]), cfg.pool).mT  # [B, H, I, C]
    # the chunk in which the block of queries ends is judged by its tokens up to there
    cut = torch.searchsorted(first, (end - 1).clamp(min=0), right=True) - 1
    own = (q * chunk_keys(k, first[cut], end, cfg.pool)).sum(-1, keepdim=True)
    at_cut = cut[:, None, :, None].expand(*score.shape[:3], 1)
    score = score.scatter(-1, at_cut, own)
    # how many tokens of each chunk may be chosen: those before the latest
    room = (torch.minimum(last, early[..., None]) - first).clamp(min=0)[:, None].expand_as(score)
    order = score.masked_fill(room == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    index = torch.cat(
        [spread(order, room, first, min(cfg.budget, m)), latest(early, end, cfg, score.shape[1])], -1
    )
    index = index.masked_fill(index < 0, m).sort(-1).values
    return Blocks(index.masked_fill(index == m, -1), cfg.block_q, 1)


def spread(order: Tensor, room: Tensor, first: Tensor, budget: int) -> Tensor:
    """[B, H, I, budget] tokens of the chunks in this order [B, H, I, C], as far as the budget goes; then -1."""
    ends = room.gather(-1, order).cumsum(-1)
    nth = torch.arange(budget, device=order.device).expand(*order.shape[:3], -1).contiguous()
    chunk = torch.searchsorted(ends, nth, right=True)
    there = chunk < order.shape[-1]
    chunk = chunk.clamp(max=order.shape[-1] - 1)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(-1, chunk)
    return torch.where(there, first[order.gather(-1, chunk)] + nth - before, -1)


def latest(early: Tensor, end: Tensor, cfg: Config, heads: int) -> Tensor:
    """[B, H, I, local] the last keys up to the end of each block of queries."""
    index = early[..., None] + torch.arange(cfg.local, device=end.device)
    return torch.where(index < end[..., None], index, -1)[:, None].expand(-1, heads, -1, -1)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        "self": "its latest keys are those of a causal text",
        "cross": "its latest keys are those of a causal text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    test_settings=(
        {"budget": 5, "local": 4, "chunk": 3, "block_q": 4},
        {"budget": 6, "local": 2, "borders": (2, 7, 8, 20), "block_q": 8, "share_heads": False},
    ),
    knob=("budget", (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 2**40)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="DHSA",
        paper="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025)",
        year=2025,
        idea="chunks of unequal length are scored fairly by the root of their length, and read token by token",
        cost="N² / (block_q · chunk) products to choose, then N · (budget + local)",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("block_topk",),
        neutral={"budget": 2**40},
        caveat=(
            "borders come from a predictor on keys in the paper, which is learned; here they are given, or "
            "even. A chunk in which a block of queries ends is judged by its tokens up to there. In the "
            "official code means are the default, tokens that a query cannot see use up its budget, and free "
            "slots are filled with the last token"
        ),
    ),
)
