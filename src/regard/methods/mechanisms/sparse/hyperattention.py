"""HyperAttention: large scores are looked for by hashes, the rest is sampled; both sums together are the softmax's.

    h(x) = (x·p_1 > 0, .., x·p_r > 0)     r random directions; patterns in Gray order: neighbours differ in one bit
    queries and keys are sorted by h and cut into blocks; a query reads the keys of its own block exactly, and of
    `sample` keys drawn with replacement those of other blocks, each with the weight M / sample:
    o_i = (Σ_own e^{s_ij} v_j + M/sample Σ_drawn e^{s_ij} v_j) / (the same without v)
    causal: o of [0, N) is that of both halves by themselves, and of the second half's queries on the first half's keys,
    of which nothing is hidden; squares of up to exact_below tokens, and fewer queries than that, are exact

On average over the draws both sums are those of softmax attention. Time is N log N: every halving reads block + sample
keys for each query.

Worked by hand, one direction, blocks of two of four keys, no sample: keys 2, -1, 3, -2 are sorted to -1, -2 | 2, 3 or
the other way round, and a positive query reads 2 and 3 alone.

>>> import math, torch
>>> q, k = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 4, 1), torch.tensor([2.0, -1.0, 3.0, -2.0]).view(1, 1, 4, 1)
>>> out, _ = reference(q, k, k, Config(projections=1, block=2, sample=0, exact_below=2), Call("self"))
>>> math.isclose(out[0, 0, 0].item(), (2 * math.exp(2) + 3 * math.exp(3)) / (math.exp(2) + math.exp(3)), rel_tol=1e-6)
True
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import by_text
from regard.ops.blocks.buckets import bucket_attention
from regard.ops.blocks.merged import Part, merged
from regard.ops.blocks.texts import each_text, plain_attention
from regard.ops.blocks.whole import whole_attention
from regard.ops.clock import part
from regard.ops.hashing import gray_rank
from regard.ops.pattern import carried
from regard.ops.softmax import at_least_float32

Side = tuple[Tensor, ...]  # (queries, their ranks), or (keys, values, ranks of keys)


@dataclass(frozen=True)
class Config:
    projections: int = 7  # r, directions, each a bit of the hash; more: a finer order
    block: int = 256  # keys of a block, in order of their hashes
    sample: int = 256  # keys drawn for all queries of a head, in a rectangle
    # tokens up to which a causal square is exact; fewer queries than this are exact too; larger: slower
    exact_below: int = 4096
    seed: int = 0  # of the directions and of the keys that are drawn

    def __post_init__(self) -> None:
        require(1 <= self.projections <= 62, "1 <= projections <= 62", projections=self.projections)
        least = min(self.block, self.exact_below, self.sample + 1, self.seed + 1)
        require(least >= 1, "block, exact_below >= 1, sample, seed >= 0", config=self)

    def directions(self, width: int) -> Tensor:
        """[D, r] in float64, the same for all heads."""
        g = torch.Generator().manual_seed(self.seed)
        return torch.randn(width, self.projections, generator=g, dtype=torch.float64)

    def draws(self, heads: int, low: int, keys: int) -> Tensor:
        """[H, sample] places in the sorted order of `keys` keys, the first of which is token `low` of the text."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + low * 8_191 + keys)
        return torch.randint(keys, (heads, self.sample), generator=g)


def ranks(x: Tensor, cfg: Config) -> list[int]:
    """Where the pattern of each row of x [n, D] stands in the Gray order, which is written out."""
    order = [0]
    for bit in range(cfg.projections):
        order += [pattern + 2**bit for pattern in reversed(order)]
    place = {pattern: at for at, pattern in enumerate(order)}
    above = x @ cfg.directions(x.shape[1]) > 0
    return [place[sum(2**bit for bit, one in enumerate(row) if one)] for row in above.tolist()]


def rectangle(q: Tensor, k: Tensor, low: int, cfg: Config) -> Tensor:
    """[H, n, m] how often each key counts, for queries [H, n, D] that may see all keys [H, m, D]."""
    (heads, n, _), m = q.shape, k.shape[1]
    if n < cfg.exact_below or m <= cfg.block:
        return q.new_ones(heads, n, m)
    counts, size = q.new_zeros(heads, n, m), math.ceil(n / math.ceil(m / cfg.block))
    for h, draws in enumerate(cfg.draws(heads, low, m).tolist()):
        rank_q, rank_k = ranks(q[h], cfg), ranks(k[h], cfg)
        keys = sorted(range(m), key=lambda j: rank_k[j])
        for at, i in enumerate(sorted(range(n), key=lambda i: rank_q[i])):
            own = at // size
            counts[h, i, keys[own * cfg.block : (own + 1) * cfg.block]] = 1.0
            for s in draws:
                counts[h, i, keys[s]] += m / cfg.sample * (s // cfg.block != own)
    return counts


def square(counts: Tensor, q: Tensor, k: Tensor, low: int, high: int, cfg: Config) -> None:
    """Writes how often keys low..high count for the queries among them; the last query is that of the last key."""
    start = k.shape[1] - q.shape[1]
    first = max(low, start)
    if high - low <= cfg.exact_below or high - first < cfg.exact_below:
        for i in range(first, high):
            counts[:, i - start, low : i + 1] = 1.0
        return
    middle = low + (high - low + 1) // 2
    rows = slice(max(middle, start) - start, high - start)
    counts[:, rows, low:middle] = rectangle(q[:, rows], k[:, low:middle], low, cfg)
    square(counts, q, k, middle, high, cfg)
    if first < middle:
        square(counts, q, k, low, middle, cfg)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    def one(q: Tensor, k: Tensor, v: Tensor, start: int, cfg: Config) -> Tensor:
        counts = q.new_zeros(len(q), q.shape[1], k.shape[1])
        if call.pattern == "causal_self":
            square(counts, q.detach(), k.detach(), 0, k.shape[1], cfg)
        else:
            counts = rectangle(q.detach(), k.detach(), 0, cfg)
        return (q @ k.mT * q.shape[-1] ** -0.5 + counts.log()).softmax(-1) @ v

    # in self a hidden token asks nothing, as in causal_self: its query would be sorted among the others
    out, state = by_text(one, q, k, v, cfg, call if call.cross else replace(call, pattern="causal_self"))
    return out, state if call.pattern == "causal_self" else None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    limit = cfg.exact_below if call.pattern == "causal_self" else cfg.block
    if q.shape[2] < cfg.exact_below or k.shape[2] <= limit:
        with part("attention"):
            return plain_attention(q, k, v, call), state
    return each_text(partial(answer, cfg, call.pattern == "causal_self"), q, k, v, call), state


def answer(cfg: Config, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output for texts of one length, without padding."""
    with part("estimate"), torch.no_grad():
        directions = cfg.directions(q.shape[-1]).to(at_least_float32(q))
        rank_q, rank_k = (gray_rank((directions.mT @ at_least_float32(x).mT > 0).mT) for x in (q, k))
    if causal:
        return torch.cat([out for out, _ in halved((q, rank_q), (k, v, rank_k), 0, cfg)], dim=2)
    return hashed((q, rank_q), (k, v, rank_k), 0, cfg)[0]


def cut(side: Side, low: int, high: int | None = None) -> Side:
    """These tokens."""
    return tuple(t[:, :, low:high] for t in side)


def halved(asks: Side, text: Side, low: int, cfg: Config) -> list[Part]:
    """Causal attention of the last n of m tokens, the first of which is token `low` of its text, piece after piece."""
    n, m = asks[0].shape[2], text[0].shape[2]
    if m <= cfg.exact_below or n < cfg.exact_below:
        with part("attention"):
            return [whole_attention(asks[0], *text[:2], scale=asks[0].shape[-1] ** -0.5, causal=True)]
    middle = (m + 1) // 2
    before = max(0, middle - (m - n))  # queries of the first half
    late, early = cut(asks, before), cut(text, 0, middle)
    own, rest = halved(late, cut(text, middle), low + middle, cfg), hashed(late, early, low, cfg)
    sizes = [out.shape[2] for out, _ in own]
    pieces = zip(rest[0].split(sizes, dim=2), rest[1].split(sizes, dim=2), strict=True)
    lower = [merged(a, b) for a, b in zip(own, pieces, strict=True)]
    return (halved(cut(asks, 0, before), early, low, cfg) if before else []) + lower


def hashed(asks: Side, text: Side, low: int, cfg: Config) -> Part:
    """Attention of queries that may see all keys, the first of which is token `low` of its text."""
    (q, rank_q), (k, v, rank_k) = asks, text
    if q.shape[2] < cfg.exact_below or k.shape[2] <= cfg.block:
        with part("attention"):
            return whole_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    draws = cfg.draws(q.shape[1], low, k.shape[2])
    return bucket_attention(q, k, v, rank_q, rank_k, cfg.block, draws, q.shape[-1] ** -0.5)


STORED = "fewer queries than exact_below read everything, and the halves of a longer text are others"
ORDER = "a query's rank among the hashes depends on the other queries, later ones too (never on later keys and values)"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self", "causal_self", "cross"),
    unsupported={"causal_cross": "queries are sorted together, so earlier ones would depend on later ones"},
    test_settings=(
        {"projections": 3, "block": 4, "sample": 5, "exact_below": 4},
        {"projections": 2, "block": 3, "sample": 2, "exact_below": 2, "seed": 1},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    exempt=dict.fromkeys(("influence", "queries", "prefix"), ORDER)
    | dict.fromkeys(("segments", "decode", "padded_state"), STORED)
    | {"heads_alone": "a head draws by its number"},
    prefills=True,
    card=Card(
        title="HyperAttention",
        paper="HyperAttention: Long-context Attention in Near-Linear Time, arXiv:2310.05869",
        year=2023,
        idea="sort queries and keys by hash, so that large scores lie in blocks; sample the other keys",
        cost="N · (block + sample) products for each halving down to exact_below, where it is exact",
        state="every key and value so far",
        needs=("qkv",),
        neutral={"block": 2**40, "exact_below": 1},
        caveat="causal in values and keys, not in queries: a later query, or a longer text, changes which keys an "
        "earlier one is near. After a prompt, fewer queries than exact_below read all that is stored. Draws are seeded "
        "by the rectangle: the same call gives the same numbers. Keys drawn from a query's own block are left out, so "
        "that the weight M / sample is right on average; the released code counts them twice on CUDA and in float32. "
        "Its hash puts pattern b at place b xor b/2, where Gray order has the inverse of that: from three directions "
        "on some of its neighbours differ in several bits, here none do. An odd text is not filled up with a zero "
        "token: its first half is longer by one. In self a hidden token asks nothing and gets zeros",
    ),
)
