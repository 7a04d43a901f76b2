"""Selective self-attention: a temperature for every query, by its token and its place, and one for every value.

    τ_q(x_i, i) = 1 + c log i + tanh(u_q·gelu(W x_i))       i: the keys that the query sees, itself included
    τ_v(x_j)    = 1 + tanh(u_v·gelu(W x_j))
    o_i         = Σ_j softmax_j(τ_q(x_i, i) q_i·k_j / √D) τ_v(x_j) v_j

where x is the layer's input, W [hidden, C], u_q and u_v [hidden] are one small network for queries and values of all
heads, and c = σ(α) is one number in (0, 1) for the layer. Among i keys of equal noise the largest weight of a softmax
falls as i grows, and a factor that grows as log i holds it; tokens that want one key and tokens that want a mean of
many need not have longer or shorter queries for that; a value may be turned down wherever it is read. As learning
begins u_q = u_v = 0, so that only the place has a say.

Worked by hand: c = 1/2, no token term, two keys 0 and 1 with values 0 and 1, a query 2, D = 1: τ = 1 + log(2) / 2 =
1.3466, so the weights are as e^0 to e^2.6931 and the output is 0.9366, not 0.8808 as without.

>>> import torch
>>> q, k = (torch.tensor(t).double().view(1, 1, -1, 1) for t in ([2.0], [0.0, 1.0]))
>>> call = Call("cross", params={"alpha": torch.tensor(0.0)})
>>> round(reference(q, k, k, Config(hidden=0), call)[0].item(), 4)
0.9366
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, exact, heads_of, quotient, softmax_attention, visible


@dataclass(frozen=True)
class Config:
    hidden: int = 32  # width of the network of the token terms; 0: no token terms, and no x is read
    position: bool = True  # whether there is a term c log i
    start: float = 0.01  # c as learning begins

    def __post_init__(self) -> None:
        require(self.hidden >= 0, "hidden >= 0", hidden=self.hidden)
        require(0 < self.start < 1, "0 < start < 1", start=self.start)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    params = {"alpha": torch.tensor(math.log(cfg.start / (1 - cfg.start)))} if cfg.position else {}
    if cfg.hidden:
        params["mlp"] = torch.randn(cfg.hidden, dims["width"]) * dims["width"] ** -0.5
        params |= {"query": torch.zeros(cfg.hidden), "value": torch.zeros(cfg.hidden)}
    return params


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    q_h, v_h, n = *exact(q, v), q.shape[2]
    tau = q_h.new_ones(1, 1, 1, 1)
    if cfg.hidden:
        x_q, x_k, w, u_q, u_v = exact(
            call.x_of_queries, call.x_of_keys, *(call.params[p] for p in ("mlp", "query", "value"))
        )
        tau = tau + torch.tanh(gelu(x_q @ w.T) @ u_q)[:, None, x_q.shape[1] - n :, None]  # [B, 1, N, 1]
        v_h = v_h * (1 + torch.tanh(gelu(x_k @ w.T) @ u_v))[:, None, :, None]
    k, v_h, state = carried(k, v_h.to(v.dtype), call)
    k_h, v_h = exact(heads_of(k, q.shape[1]), heads_of(v_h, q.shape[1]))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * q.shape[3] ** -0.5
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - n)
    if cfg.position:
        c = torch.sigmoid(call.params["alpha"].double())
        tau = tau + c * sees.sum(-1, keepdim=True).clamp(min=1).double().log()
    s = (tau * s).masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    return quotient(e @ v_h, e.sum(-1, keepdim=True)).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    """Softmax attention of scaled queries on scaled values, which are what the state stores."""
    dtype, tau = q.dtype, 1.0
    if cfg.hidden:
        x = call.x_of_queries
        tau = 1 + token_term(x[:, x.shape[1] - q.shape[2] :], call, "query")
        v = (v * (1 + token_term(call.x_of_keys, call, "value"))).to(v.dtype)
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    square = call.pattern == "causal_self" and call.key_mask is None and call.pair_mask is None and n == m
    mask = None if square else visible(call, n, m, q.device)
    if cfg.position:
        c = at_least_float32(call.params["alpha"]).sigmoid()
        if square:
            count = torch.arange(1, n + 1, device=q.device)[:, None]
        else:
            count = q.new_tensor(m, dtype=torch.long) if mask is None else mask.sum(-1, keepdim=True)
        tau = tau + c * count.clamp(min=1).to(c.dtype).log()
    # n == m is a symbol under torch.compile with lengths that differ, and SDPA wants a bool
    causal = call.pattern == "causal_self" if square else False
    out = softmax_attention((q * tau).to(dtype), k, v, scale=q.shape[3] ** -0.5, mask=mask, causal=causal)
    return out.to(v.dtype), state


def token_term(x: Tensor, call: Call, of: str) -> Tensor:
    """tanh(u·gelu(W x)) [B, 1, N|M, 1] of queries or values."""
    x = at_least_float32(x)
    hidden = gelu(linear(x, call.params["mlp"].to(x.dtype)))
    return (hidden @ call.params[of].to(x.dtype)).tanh()[:, None, :, None]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    pair_masks=True,
    needs_x=lambda cfg: cfg.hidden > 0,
    test_settings=({"hidden": 0, "start": 0.5}, {"hidden": 3, "position": False}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Selective self-attention",
        paper="Selective Attention: Enhancing Transformer through Principled Context Control, arXiv:2411.12892",
        year=2024,
        idea="a softmax temperature for each query, by its token and its place, and a scale for each value",
        cost="that of softmax attention, and O((N + M)·C·hidden) for the token terms",
        state="every key, and every value times its scale: (D + E)·n numbers per KV head",
        needs=("qkv", "x"),
        lineage=("softmax",),
        neutral={"hidden": 0, "position": False},
        caveat=(
            "the released code has the position term alone: c = exp(-exp β), one β a layer, from 1.5 or 2 on (c = "
            "0.011 or 0.0006), and i is the row in the current block, so that a cache would begin again at 1; here i "
            "counts visible keys, padding left out, and c = σ(α). The token terms are not in it: that they are tanh of "
            "a small network of x, shared by queries and values, is the paper's; its width, gelu and the 1 "
            "of τ_v, which makes zero neutral, are choices here. A network of width 32 adds 0.35 % to a layer of 768"
        ),
    ),
)
