"""Core context aware attention: groups of tokens far back become one core token each, the latest stay as they are.

    a_n = softmax_t(q_last(n)·k_t / √D)           over the g tokens of group n, asked by its last query
    k'_n = Σ_t a_nt k_t,  v'_n = Σ_t a_nt v_t     the core token of group n
    c_i = max(0, ⌊(i + 1 - s) / g⌋)               groups that lie wholly before the last s tokens of query i
    o_i = one softmax over the cores 0 .. c_i - 1 and the tokens g·c_i .. i

where i counts from 0. Between the cores and the query there are s to s + g - 1 tokens, as many as leave neither a gap
nor an overlap. The paper pools the layer's inputs and projects the result: a projection is linear and the weights sum
to one, so that is the pooled key and value. What is in no core yet is read token by token, and with s >= N nothing is
pooled: full causal attention. Groups are counted in tokens that are there; a hidden token gives zero.

Worked by hand: g = 2, s = 1, all scores 0: query 2 has one core of the values 4 and 8, which is 6, and its own value 0;
the two weigh the same: 3.

>>> import torch
>>> zero, v = torch.zeros(1, 1, 3, 1), torch.tensor([4.0, 8.0, 0.0]).view(1, 1, 3, 1)
>>> reference(zero, zero, v, Config(group=2, local=1), Call())[0][0, 0, 2].item()
3.0
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head
from regard.ops.blocks import in_blocks
from regard.ops.closed import carried_with_queries, closed, near_and_summed

REFUSED = (
    "a core is asked by the last query of its group, and stands for tokens before the query that reads it"
)
OWN_TEXT = "own text: as many queries as keys, since the last query of a group makes its core"


@dataclass(frozen=True)
class Config:
    group: int = 16  # g, tokens of a core
    local: int = 1024  # s, the latest tokens, which are in no core

    def __post_init__(self) -> None:
        require(self.group >= 1 and self.local >= 1, "group >= 1 and local >= 1", cfg=self)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, heads = q.shape[2], q.shape[1]
    before = call.initial_state or (k[:, :, :0], v[:, :, :0], q[:, :, :0])
    k, v, q = state = tuple(torch.cat(parts, dim=2) for parts in zip(before, (k, v, q), strict=True))
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    there = torch.ones_like(k_h[..., 0], dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    out = torch.zeros_like(v_h)
    for b, h in ((b, h) for b in range(len(q)) for h in range(heads)):
        tokens = there[b, h].nonzero()[:, 0]
        one = one_head(q_h[b, h, tokens], k_h[b, h, tokens], v_h[b, h, tokens], cfg)
        out[b, h, tokens] = one
    return out[:, :, -n:].to(v.dtype), state


def one_head(q: Tensor, k: Tensor, v: Tensor, cfg: Config) -> Tensor:
    """[T, E] of T tokens, all of them there."""
    scale, g, cores, rows = q.shape[-1] ** -0.5, cfg.group, [], []
    for i in range(len(q)):
        if i - cfg.local >= g * (len(cores) + 1) - 1:
            group = slice(g * len(cores), g * (len(cores) + 1))
            a = (k[group] @ q[group.stop - 1] * scale).softmax(0)
            cores.append((a @ k[group], a @ v[group]))
        latest = slice(g * len(cores), i + 1)
        keys = torch.cat([k[:0], *(core[None] for core, _ in cores), k[latest]])
        values = torch.cat([v[:0], *(core[None] for _, core in cores), v[latest]])
        rows.append((keys @ q[i] * scale).softmax(0) @ values)
    return torch.stack(rows) if rows else v


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, dtype = q.shape[2], v.dtype
    q, k, v, state = carried_with_queries(q, k, v, call)
    m, g, s = q.shape[2], min(cfg.group, q.shape[2]), cfg.local
    text = closed(call, n, m)
    k_c, v_c = text.keys(k), text.keys(v)

    def pooled(i: Any) -> Any:
        """Groups that the query at place i reads as cores; below 1: none."""
        return (i + 1 - s) // cfg.group

    def span(a: int, b: int) -> tuple[int, int, int]:
        return max(0, pooled(a)) * g, b, max(0, pooled(b - 1))

    def sees(place: Tensor, token: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        c = pooled(place).clamp(min=0)
        return (token >= c * cfg.group) & (token <= place), core < c

    cores = made(text.keys(q), k_c, v_c, g, max(0, pooled(m - 1)))
    out = near_and_summed(text.queries(q[:, :, m - n :]), k_c, v_c, cores, text, span, sees)
    return text.opened(out).to(dtype), state


def made(q: Tensor, k: Tensor, v: Tensor, g: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `count` cores, [B, H, count, ...], in float32 at least."""
    q, k, v = (in_blocks(t[:, :, : g * count], g) for t in (q, k, v))  # [B, H, count, g, ...]
    k, v = (at_least_float32(per_query_head(t, q.shape[1])) for t in (k, v))
    a = at_least_float32(q[:, :, :, -1:]) * q.shape[4] ** -0.5 @ k.mT
    a = a.softmax(-1)  # [B, H, count, 1, g]
    return (a @ k)[:, :, :, 0], (a @ v)[:, :, :, 0]


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return n * (dims["heads"] * dims["key"] + dims["kv_heads"] * (dims["key"] + dims["value"]))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("causal_self",),
    unsupported=dict.fromkeys(("self", "cross", "causal_cross"), REFUSED),
    test_settings=({"group": 3, "local": 2}, {"group": 4, "local": 1}, {"group": 2, "local": 5}),
    state_size=state_size,
    exempt={"queries": "the last query of a group weighs the tokens of its core, which later queries read"},
    card=Card(
        title="Core Context Aware attention (CCA)",
        paper="Core Context Aware Transformers for Long Context Language Modeling, arXiv:2412.12465",
        year=2024,
        idea="groups of tokens far back are pooled to one core each by their last query; the latest stay single",
        cost="O(N·(N/g + s + g)·(D + E)) time; a query reads N/g + s + g - 1 keys at most",
        state="every query, key and value: (H·D + G·(D + E))·n numbers for H query heads and G KV heads",
        needs=("qkv", "decoder-lm"),
        lineage=("softmax",),
        neutral={"local": 2**30},
        caveat=(
            "keys and queries come rotated, as in the released code, so a core's key is a mean of rotated keys and "
            "gets no rotation of its own. That code stores cores and the latest tokens alone, and rounds their number "
            "to multiples of 64 in training; its kernel has the window's length as s + i mod g, which leaves no gap "
            "only where s is a multiple of g. Here all tokens are stored, and cores made anew, as padding may differ"
        ),
    ),
)
