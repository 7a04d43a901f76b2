"""Softmax attention with a learned key per head that belongs to no token: a place for weight that nobody needs.

    s_ij = scale · q_i·k_j,   s_i* = scale · q_i·k*
    o_i  = (Σ_j e^{s_ij} v_j + e^{s_i*} v*) / (Σ_j e^{s_ij} + e^{s_i*})       over the keys j that i sees

where k* is learned, one for each KV head, and v* is zero, or learned too. Softmax weights sum to one, so a query that
needs no token has to put its weight somewhere: models learn to put it on the first token, whose value they make small.
With k* in place that is where it goes, and the first token is free. A sink score of `softmax` is the same for all
queries; here the query decides. With `value` alone v* is added to every output.

Worked by hand: scale 1, a query 1, keys 0 and log 3, values 0 and 4, k* = log 4: the weights are 1/8, 3/8 and 1/2, the
output 3/2; with v* = 5 it is 3/2 + 5/2 = 4.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0], [0.0, math.log(3)], [0.0, 4.0]))
>>> params = {"key": torch.tensor([[math.log(4)]])}
>>> round(reference(q, k, v, Config(scale=1.0), Call("cross", params=params))[0].item(), 4)
1.5
>>> params["value"] = torch.tensor([[5.0]])
>>> round(reference(q, k, v, Config(scale=1.0, value=True), Call("cross", params=params))[0].item(), 4)
4.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of, per_query_head, quotient, softmax_attention, visible


@dataclass(frozen=True)
class Config:
    key: bool = True  # params["key"] [G, D]
    value: bool = False  # params["value"] [G, E]; False: zero
    scale: float | None = None  # None: D ** -0.5


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    wanted = [name for name in ("key", "value") if getattr(cfg, name)]
    return {name: 0.02 * torch.randn(dims["kv_heads"], dims[name]) for name in wanted}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    groups, heads = k.shape[1], q.shape[1]
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * scale
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - s.shape[2])
    s = s.masked_fill(~sees, -torch.inf)
    own = s.new_full((*s.shape[:3], 1), -torch.inf)  # s_i*
    shift = v_h.new_zeros(1, heads, 1, v_h.shape[3])  # v*
    if cfg.key:
        learned = call.params["key"].double().repeat_interleave(heads // groups, dim=0)
        own = torch.einsum("bhnd,hd->bhn", q_h, learned)[..., None] * scale
    if cfg.value:
        shift = call.params["value"].double().repeat_interleave(heads // groups, dim=0)[None, :, None]
    # cancels; keeps the exponentials below 1
    top = torch.maximum(s.amax(-1, keepdim=True), own).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    e, e_own = (s - top).exp(), (own - top).exp()
    out = quotient(e @ v_h + e_own * shift, e.sum(-1, keepdim=True) + e_own)
    if cfg.value and not cfg.key:
        out = out + shift
    # a row without a token is padding
    return torch.where(sees.any(-1, keepdim=True), out, 0).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    groups, n = k.shape[1], q.shape[2]
    k, v, state = carried(k, v, call)
    m = k.shape[2]
    square = call.pattern == "causal_self" and call.key_mask is None and call.pair_mask is None and n == m
    mask = None if square else visible(call, n, m, q.device)
    # n == m is a symbol under torch.compile with lengths that differ, and SDPA wants a bool
    causal = call.pattern == "causal_self" if square else False
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    shift = call.params["value"].to(v.dtype)[None, :, None] if cfg.value else None  # [1, G, 1, E]
    if not cfg.key:
        out = softmax_attention(q, k, v, scale=scale, mask=mask, causal=causal)
        out = out if shift is None else out + per_query_head(shift, q.shape[1])
    else:
        k, v = before(k, call.params["key"][None, :, None], groups), before(v, shift, groups)
        if causal:
            # a first query for the first key keeps the causal mask square
            q = torch.cat([q.new_zeros(*q.shape[:2], 1, q.shape[3]), q], dim=2)
        wide = None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=True)
        out = softmax_attention(q, k, v, scale=scale, mask=wide, causal=causal)[:, :, -n:]
    if mask is not None:
        out = torch.where(mask.any(-1, keepdim=True), out, 0)
    return out.to(v.dtype), state


def before(tokens: Tensor, first: Tensor | None, groups: int) -> Tensor:
    """[B, G', 1 + M, D]: the learned row [1, G, 1, D], or zeros, before the tokens of its head."""
    if first is None:
        first = tokens.new_zeros(1, groups, 1, tokens.shape[3])
    heads = tokens.shape[1]
    first = per_query_head(first.to(tokens.dtype), heads).expand(len(tokens), heads, -1, -1)
    return torch.cat([first, tokens], dim=2)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    pair_masks=True,
    test_settings=({"value": True}, {"key": False, "value": True}, {"scale": 0.3, "value": True}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Attention with a key bias",
        paper="When Attention Sink Emerges in Language Models: An Empirical View, arXiv:2410.10781",
        year=2024,
        idea="a learned key per head, without a value, takes the weight that softmax would else put on the first token",
        cost="that of softmax attention over one key more",
        state="every key and value so far: (D + E)·n numbers per KV head; the learned key is a parameter",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"key": False, "value": False},
        caveat=(
            "the learned key stands outside the text: no position turns it, no mask hides it, no state holds it. A "
            "query that sees no token gives zero, though it could still read the learned value. The paper's code adds "
            "k* and v* per query head, which with its ungrouped heads is the same; it also tries one for all heads"
        ),
    ),
)
