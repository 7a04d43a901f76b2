"""Superlinear attention: a query scores √t keys, as in a jump search, and reads a span around the best of them.

    w   = ⌊(s + 1)^{1/p}⌋ - 1               the window: the latest keys, the query's own included
    a_i = t - ⌊i^{1/p}⌋                     anchors, i > s, as long as a_i >= 0; the query sees t keys
    r_i = (W q)·k_{a_i}                     W [D, D]: a routing matrix for each head, learned
    S_i = a_i - ⌈b t^e⌉ .. a_i + ⌈f t^e⌉    the anchor's span, clipped to the keys before the window
    o   = Σ_i g_i · softmax attention of q over the window and S_i

The sum is over the top_k anchors of highest r_i, and g is the softmax of these. Keys are counted from 0.

With p = e = 1/2 both steps read about √t keys, N^1.5 in all. Neighbouring anchors i and i + 1 lie 2i + 1 < 2√t apart,
so with b = 2 their spans leave no key out: which keys are read is the data's choice, none is ruled out by its place.
The choice is hard; the routing learns through g. Where there is no anchor before the window, the window is all.

Worked by hand: query 8 sees t = 9 keys. s = 1: the window has 2² - 1 = 3, anchors i = 2 and 3 stand on keys 5 and 0;
b = 1/3 makes spans of 4, 5 and of 0. All scores are 0: five keys with the value 20 among them give 4, four with 40
give 10, the mixture of both is 7.

>>> cfg = Config(window_index=1, back=1 / 3)
>>> window(cfg), [8 - distance for distance in distances(9, cfg)], lengths(9, cfg)
(3, [5, 0], (1, 0))
>>> zero, v = torch.zeros(1, 1, 9, 1), torch.tensor([40.0, 0, 0, 0, 0, 20, 0, 0, 0]).view(1, 1, 9, 1)
>>> reference(zero, zero, v, cfg, Call(params={"route": torch.ones(1, 1, 1)}))[0][0, 0, 8].item()
7.0
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, gather_rows, part
from regard.ops.blocks import BlockSettings, by_text, latest_keys, placed
from regard.ops.closed import chunks, highest, recomputed

GATHERED = 1 << 22  # numbers of keys and values gathered at a time: changes the speed, never the result
TILE = 64  # queries and keys of a block of the window: changes the speed, never the result
HIDDEN = -1e30
NEAR = 1e-9  # powers that are whole numbers may come out a little beside them


@dataclass(frozen=True)
class Config(BlockSettings):
    top_k: int = 3  # spans that a query mixes
    window_index: int = 3  # s: anchors up to this one are in the window, of (s + 1)^{1/p} - 1 keys
    back: float = 2.0  # b
    ahead: float = 0.0  # f
    search_power: float = 0.5  # p
    span_power: float = 0.5  # e
    block_q: int = 1
    block_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1 and self.window_index >= 0, "top_k >= 1, window_index >= 0", config=self)
        require(self.back >= 0 and self.ahead >= 0, "back, ahead >= 0", config=self)
        require(0 < self.search_power < 1 and 0 < self.span_power < 1, "both powers in (0, 1)", config=self)
        require(self.block_q == self.block_k == 1, "block_q = block_k = 1: spans begin anywhere", config=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    return {"route": torch.eye(dims["key"]).repeat(dims["heads"], 1, 1)}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    def one(q: Tensor, k: Tensor, v: Tensor, start: int, cfg: Config) -> Tensor:
        route = call.params["route"].double()
        return torch.stack([head(*x, start, cfg) for x in zip(q, k, v, route, strict=True)])

    return by_text(one, q, k, v, cfg, call)


def head(q: Tensor, k: Tensor, v: Tensor, route: Tensor, start: int, cfg: Config) -> Tensor:
    """[N, E] of one head of one text, query by query."""
    s, power, rows = cfg.window_index, 1 / cfg.search_power, []
    for n, x in enumerate(q):
        t = start + n + 1
        dense = len(k) <= cfg.dense_below or t > len(k) - cfg.dense_last
        w = t if dense else min(t, math.floor((s + 1) ** power + 1e-9) - 1)
        steps = [math.floor(i**power + 1e-9) for i in range(s + 1, s + t + 1)]
        anchors = [t - step for step in steps if w < step <= t]
        score = k[anchors] @ (route @ x)
        best = sorted(range(len(anchors)), key=lambda i: (-score[i].item(), i))[: cfg.top_k]
        back, ahead = (math.ceil(by * t**cfg.span_power - 1e-9) for by in (cfg.back, cfg.ahead))
        spans = [range(max(0, anchors[i] - back), min(anchors[i] + ahead, t - 1 - w) + 1) for i in best]
        gate = score[best].softmax(0) if best else score.new_ones(1)
        keys = [[*span, *range(t - w, t)] for span in spans or [range(0)]]
        outs = [(k[read] @ x * len(x) ** -0.5).softmax(0) @ v[read] for read in keys]
        rows.append(gate @ torch.stack(outs))
    return torch.stack(rows)


def window(cfg: Config) -> int:
    """Keys of the window, the query's own included."""
    return math.floor((cfg.window_index + 1) ** (1 / cfg.search_power) + NEAR) - 1


def distances(t: int, cfg: Config) -> list[int]:
    """From a query that sees t keys to each of its anchors, the nearest first."""
    found, i = [], cfg.window_index + 1
    while (distance := math.floor(i ** (1 / cfg.search_power) + NEAR) - 1) < t:
        found.append(distance)
        i += 1
    return found


def lengths(t: int, cfg: Config) -> tuple[int, int]:
    """How far the spans of a query that sees t keys reach before and behind an anchor."""
    return tuple(math.ceil(by * t**cfg.span_power - NEAR) for by in (cfg.back, cfg.ahead))


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    k, v, state = carried(k, v, call)
    at, m = placed(q, k, v, call, TILE), k.shape[2]
    if m <= cfg.dense_below:
        return at.back(latest_keys(at, TILE, m)[0]).to(v.dtype), state, {}
    place, hidden = at.asked()
    near, lse = (at.back(t) for t in latest_keys(at, TILE, min(window(cfg), m)))
    out, *spans = spread((q, at.k, at.v, call.params["route"], near, lse, place), cfg)
    if cfg.dense_last:
        since = at.length - cfg.dense_last
        dense, whole = place >= since[:, None, None, None], at.back(latest_keys(at, TILE, m, since)[0])
        out, spans = torch.where(dense, whole, out), [x.masked_fill(dense, -1) for x in spans]
    if hidden is not None:
        out, spans = out.masked_fill(hidden, 0), [x.masked_fill(hidden, -1) for x in spans]
    return out.to(v.dtype), state, {"spans": tuple(spans)}


def spread(inputs: tuple[Tensor, ...], cfg: Config) -> tuple[Tensor, ...]:
    """(out [B, H, n, E], first and last keys of the spans [B, H, n, top_k], -1 where there are fewer)."""
    q, k, v, route, near, lse, place = inputs
    m, reach, found = k.shape[2], sum(lengths(k.shape[2], cfg)) + 1, []
    per_row = q.shape[0] * q.shape[1] * cfg.top_k * reach * (k.shape[3] + v.shape[3])
    # the last queries read most: those before them find room in the memory that these leave
    for rows in reversed([*chunks(q.shape[2], GATHERED // per_row)]):
        t = m - q.shape[2] + rows.stop  # no query of these sees more keys
        own = (x[:, :, rows] for x in (q, near, lse, place))
        found.append(recomputed(q.shape[2] * per_row, mixed, *own, k, v, route, t, cfg))
    return tuple(torch.cat(x, dim=2) for x in zip(*reversed(found), strict=True))


def mixed(
    q: Tensor, near: Tensor, lse: Tensor, place: Tensor, k: Tensor, v: Tensor, route: Tensor, most: int, cfg: Config
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of a few queries at these places [B, 1, n, 1], whose windows gave `near` and `lse`."""
    q, near = at_least_float32(q), at_least_float32(near)
    with part("estimate"):
        gate, first, last = chosen(q, k, place, route, most, cfg)
    with part("attention"):
        slots = first[..., None] + torch.arange(min(sum(lengths(most, cfg)) + 1, most), device=q.device)
        seen = (slots <= last[..., None]) & (first >= 0)[..., None]  # [B, H, n, top_k, L]
        slots = slots.masked_fill(~seen, 0).flatten(2)
        k, v = (at_least_float32(gather_rows(x, slots)).unflatten(2, (q.shape[2], -1)) for x in (k, v))
        s = (k @ (q * q.shape[3] ** -0.5)[..., None])[..., 0].view(seen.shape).masked_fill(~seen, HIDDEN)
        s = torch.cat([lse.clamp(min=HIDDEN)[..., None, None].expand(*s.shape[:4], 1), s], dim=-1)
        weights = s.softmax(-1) * gate[..., None]
        own, far = weights[..., 0].sum(-1, keepdim=True), weights[..., 1:].flatten(3)
        return own * near + (far[..., None, :] @ v)[..., 0, :], first, last


def chosen(q: Tensor, k: Tensor, place: Tensor, route: Tensor, most: int, cfg: Config) -> tuple[Tensor, ...]:
    """(gate, first key, last key) [B, H, n, top_k] of the spans around the anchors that fit best."""
    # filled up by steps that lead out of the text, so that there are top_k to choose from
    step = torch.tensor([*distances(most, cfg), *[most] * cfg.top_k], device=q.device)
    anchors = (place - step).expand(len(q), 1, q.shape[2], -1)  # below 0: there is none
    keys = at_least_float32(gather_rows(k, anchors.clamp(min=0).flatten(2))).unflatten(2, (q.shape[2], -1))
    asked = (at_least_float32(route) @ q.mT).mT.unflatten(1, (k.shape[1], -1))  # [B, G, H / G, n, D]
    score = (asked.transpose(2, 3) @ keys.mT).transpose(2, 3).flatten(1, 2)  # [B, H, n, A]
    best = highest(score.detach().masked_fill(anchors < 0, -torch.inf), cfg.top_k)
    there, taken = best >= 0, best.clamp(min=0)
    # where there is no anchor all gates are alike, and what they mix is the window each time
    gate = score.gather(-1, taken).masked_fill(~there, HIDDEN).softmax(-1)
    anchor = place - step[taken]
    root = (place + 1).double() ** cfg.span_power
    back, ahead = ((by * root - NEAR).ceil().long() for by in (cfg.back, cfg.ahead))
    first, last = (anchor - back).clamp(min=0), torch.minimum(anchor + ahead, place - window(cfg))
    return gate, first.masked_fill(~there, -1), last.masked_fill(~there, -1)


REFUSED = "anchors and spans are counted back from a query's own place"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("causal_self",),
    unsupported=dict.fromkeys(("self", "cross", "causal_cross"), REFUSED),
    test_settings=(
        {"top_k": 1, "window_index": 0, "back": 1.0},
        {"top_k": 2, "window_index": 1, "back": 0.5, "ahead": 0.5},
        {"top_k": 2, "window_index": 2, "search_power": 0.6, "span_power": 0.4},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Superlinear Multi-Step Attention",
        paper="Superlinear Multi-Step Attention (2026)",
        year=2026,
        idea="a query scores √t anchors, reads a span of √t keys around the best few, and mixes these by the scores",
        cost="O(N^1.5·(D + E)) time, with p = e = 1/2; linear memory; it pays from about 10^5 tokens on",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv", "decoder-lm"),
        lineage=("softmax",),
        neutral={"window_index": 2**20},
        caveat=(
            "anchors, spans and window are those of the released kernels, whose window_index is 0 by default and 3 in "
            "an example, as here; scores of anchors have no 1/√D. The released model accumulates keys by Mamba-2 "
            "before, and projects routing queries from the layer's input; here they are W q. A key in several spans "
            "counts in each. On a model it reads prompts; decoding is dense"
        ),
    ),
)
