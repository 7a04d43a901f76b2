"""Lean Attention: decode attention as stream-K; every worker gets an equal span of key tiles, across head borders.

    tiles of unit u      t_u = ⌈M_u / tile⌉                     a unit is one KV head of one batch row
    span of worker w     [⌊w T / W⌋, ⌊(w+1) T / W⌋)             of all T = Σ t_u tiles, laid end to end
    partial of a span    m = max_j s_j,  l = Σ_j e^{s_j - m},  o = Σ_j e^{s_j - m} v_j        o not yet divided by l
    merge                m = max_i m_i,  l = Σ_i l_i e^{m_i - m},  o = Σ_i o_i e^{m_i - m};   at the end o / l

where W workers are the streaming multiprocessors of a GPU. The merge is associative and commutative, so spans may be
cut anywhere and come home in any order, and loads then differ by at most one tile. Splitting each head into a fixed
number of parts (FlashDecoding) gives parts of unequal length, and a last wave that leaves workers idle. An empty span
carries o = 0, m = -∞, l = 0, which the merge ignores.

Three units of 5, 1 and 3 tiles for two workers: the first takes four of the first unit, the second the rest.

>>> schedule([5, 1, 3], workers=2)
[[(0, 0, 4)], [(0, 4, 5), (1, 0, 1), (2, 0, 3)]]
>>> loads(schedule([5, 1, 3], workers=2)), loads(fixed_split([5, 1, 3], splits=2, workers=2))
([4, 5], [5, 4])
>>> loads(schedule([8, 1, 1], workers=3)), loads(fixed_split([8, 1, 1], splits=2, workers=3))
([3, 3, 4], [4, 4, 2])
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, finish, heads_of, merge, partial, quotient, visible

Span = tuple[int, int, int]  # unit, first tile, past the last tile


@dataclass(frozen=True)
class Config:
    scale: float | None = None  # None: D ** -0.5
    tile: int = 256  # keys; changes the speed, never the result
    workers: int = 108  # those of an A100; changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.tile >= 1, "tile >= 1", tile=self.tile)
        require(self.workers >= 1, "workers >= 1", workers=self.workers)


def schedule(tiles: Sequence[int], workers: int) -> list[list[Span]]:
    """For every worker its spans, in order. `tiles` holds the tiles of every unit; a unit may have none."""
    ends = list(accumulate(tiles))
    cuts, work = [w * sum(tiles) // workers for w in range(workers + 1)], []
    for start, stop in pairwise(cuts):
        firsts = ((unit, end - size, end) for unit, (size, end) in enumerate(zip(tiles, ends, strict=True)))
        cut = ((unit, max(start - first, 0), min(stop, end) - first) for unit, first, end in firsts)
        work.append([(unit, a, b) for unit, a, b in cut if a < b])
    return work


def fixed_split(tiles: Sequence[int], splits: int, workers: int) -> list[list[Span]]:
    """For comparison: every unit in `splits` equal parts, each in turn to the worker with the least to do."""
    work, free = [[] for _ in range(workers)], [(0, w) for w in range(workers)]
    for unit, size in enumerate(tiles):
        part = -(-size // splits)
        for a in range(0, size, max(part, 1)):
            load, w = heapq.heappop(free)
            work[w].append((unit, a, min(a + part, size)))
            heapq.heappush(free, (load + work[w][-1][2] - a, w))
    return work


def loads(work: list[list[Span]]) -> list[int]:
    return [sum(stop - start for _, start, stop in spans) for spans in work]


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    """Softmax attention, written out: a schedule changes no number."""
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * (q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale)
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - s.shape[2])
    s = s.masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    return quotient(e @ v_h, e.sum(-1, keepdim=True)).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    (batch, heads, n, _), (_, groups, m, _) = q.shape, k.shape
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    mask = visible(call, n, m, q.device)
    sees = None if mask is None else mask.expand(batch, heads, n, m)
    done: list = [None] * (batch * groups)
    # counted, a number to torch.compile too, which would ask of every span how it lies with any number of tokens
    tiles = len(k.split(cfg.tile, dim=2))
    for spans in schedule([tiles] * (batch * groups), cfg.workers):
        for unit, start, stop in spans:
            row, group = slice(unit // groups, unit // groups + 1), unit % groups
            head = slice(group * heads // groups, (group + 1) * heads // groups)
            keys = slice(start * cfg.tile, min(stop * cfg.tile, m))
            seen = None if sees is None else sees[row, head, :, keys]
            k_s, v_s = (t[row, group : group + 1, keys] for t in (k, v))
            part = partial(q[row, head], k_s, v_s, scale, seen)
            done[unit] = part if done[unit] is None else merge(done[unit], part)
    # [B·G, H/G, N, E]
    out = torch.cat([finish(*parts) for parts in done])
    return out.view(batch, heads, n, -1).to(v.dtype), state


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=PATTERNS,
    pair_masks=True,
    speed_settings=("tile", "workers"),
    test_settings=({"tile": 4, "workers": 3}, {"tile": 7, "workers": 5}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Lean Attention",
        paper="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase, arXiv:2405.10480",
        year=2024,
        idea="all key tiles of all heads in one row, cut into equal spans; partial results merge in any order",
        cost="that of softmax attention; the busiest worker has ⌈T / W⌉ tiles",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"tile": 2**30, "workers": 1},
        caveat=(
            "here workers run one after the other: the schedule and the merge are the paper's, its speed-ups on GPUs "
            "are not measured. The partials are unnormalised o with (m, l), not o / l with a log-sum. A unit is a KV "
            "head, whose query heads share its keys; the paper's is a query head"
        ),
    ),
)
