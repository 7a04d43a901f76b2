"""Softmax attention: every query takes a weighted mean of the values, weighted by how well the keys fit it.

    s_ij = softcap · tanh(scale · q_i·k_j / softcap)         without a softcap: scale · q_i·k_j
    w_ij = e^{s_ij} / (Σ_j e^{s_ij} + e^{sink_h})            over the keys j that i sees; without sinks: no last term
    o_i  = Σ_j w_ij v_j

where scale is 1/√D unless it is given, so that scores of random vectors have variance 1 at any width. Query head h
reads key head h // (H/G). A sink is a learned score per head with no value behind it: a head may look at nothing.
A query that sees no key gives 0. Queries do not speak to each other, so causal_cross is the same numbers as cross.

Worked by hand: scale 1, a query 1, keys 0 and log 3, values 0 and 4: the weights are 1/4 and 3/4, the output 3. With
a sink score of log 4 the sum is 8 instead of 4, and the output 3/2.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0], [0.0, math.log(3)], [0.0, 4.0]))
>>> round(reference(q, k, v, Config(scale=1.0), Call())[0].item(), 6)
3.0
>>> call = Call(params={"sinks": torch.tensor([math.log(4)])})
>>> round(reference(q, k, v, Config(scale=1.0, sinks=True), call)[0].item(), 6)
1.5
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of, join_sinks, quotient, softmax_attention, visible
from regard.ops.blocks import Blocks, block_attention


@dataclass(frozen=True)
class Config:
    scale: float | None = None  # None: D ** -0.5
    softcap: float | None = None  # Gemma 2 (arXiv:2408.00118)
    sinks: bool = False  # learned scores params["sinks"] [H]: gpt-oss (arXiv:2508.10925)

    def __post_init__(self) -> None:
        require(self.softcap is None or self.softcap > 0, "softcap > 0", softcap=self.softcap)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    return {"sinks": torch.zeros(dims["heads"])} if cfg.sinks else {}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * scale
    if cfg.softcap is not None:
        s = cfg.softcap * torch.tanh(s / cfg.softcap)
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - s.shape[2])
    sink = call.params["sinks"].double() if cfg.sinks else s.new_tensor([-torch.inf])
    s, sink = s.masked_fill(~sees, -torch.inf), sink.view(1, -1, 1, 1)
    # cancels; keeps the exponentials below 1
    top = torch.maximum(s.amax(-1, keepdim=True), sink).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    e = (s - top).exp()  # [B, H, N, M]
    return quotient(e @ v_h, e.sum(-1, keepdim=True) + (sink - top).exp()).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    sinks = call.params["sinks"] if cfg.sinks else None
    if call.blocks is not None:
        return over_blocks(q, k, v, call.blocks, scale, sinks), state
    square = call.pattern == "causal_self" and call.key_mask is None and call.pair_mask is None and n == m
    mask = None if square else visible(call, n, m, q.device)
    # n == m is a symbol under torch.compile with lengths that differ, and SDPA wants a bool
    causal = call.pattern == "causal_self" if square else False
    out = softmax_attention(q, k, v, scale=scale, mask=mask, causal=causal, softcap=cfg.softcap, sinks=sinks)
    return out.to(v.dtype), state


def over_blocks(q: Q, k: K, v: V, blocks: Blocks, scale: float, sinks: Tensor | None) -> Out:
    out, lse = block_attention(q, k, v, blocks, scale=scale)
    return out if sinks is None else join_sinks(out, lse, sinks)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    pair_masks=True,
    block_masks=lambda cfg: getattr(cfg, "softcap", None) is None,
    test_settings=({"scale": 0.3, "softcap": 2.0}, {"sinks": True}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Softmax attention",
        paper="Attention Is All You Need, arXiv:1706.03762",
        year=2017,
        idea="a query mixes all values by the softmax of its scaled products with their keys",
        cost="O(N·M·(D + E)) time; the fused path never holds the N × M weights",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        neutral={"softcap": None, "sinks": False},
        caveat=(
            "grouped heads, the softcap and the learned sinks came later (GQA arXiv:2305.13245, Gemma 2, gpt-oss). "
            "SDPA's own is_causal puts query 0 at key 0; here the last query is at the last key, as a cache needs"
        ),
    ),
)
