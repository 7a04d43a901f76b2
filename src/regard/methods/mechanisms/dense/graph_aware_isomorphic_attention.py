"""Graph-aware isomorphic attention: attention weights as the edges of a graph, and a graph isomorphism network on it.

    A   = softmax(Q Kᵀ / √D)                          who sees whom, and how much: a weighted graph of tokens
    x_i = (1 + ε) v_i + Σ_j A_ij v_j                  a token's own value beside what its neighbours say
    o_i = W_2 silu(rmsnorm(W_1 x_i + b_1)) + b_2      an MLP for each head, of width expand·E

where ε is learned for each head, from 0. Softmax attention stops at A v, a weighted mean in which a token's own value
is one of many; here it stands beside the mean, and a nonlinear map of each head reads both. With ε = -1 and no MLP it
is softmax attention. A query needs a value of its own, so there is no cross form.

Worked by hand: one head, two tokens of zero queries and values 2 and 4; A is 1 for the first token and 1/2, 1/2 for the
second. With ε = 1/2 and no MLP the outputs are 3/2·2 + 2 = 5 and 3/2·4 + 3 = 9.

>>> import torch
>>> zeros, v = torch.zeros(1, 1, 2, 1), torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
>>> reference(zeros, zeros, v, Config(eps=0.5, expand=0), Call())[0].flatten()
tensor([5., 9.])

With W_1 = (1, 1), a norm, W_2 = (1, 1) and no bias both hidden numbers are 1 after the norm, and the output 2·silu(1).

>>> params = {"w_1": torch.ones(1, 2, 1), "w_2": torch.ones(1, 1, 2), "norm": torch.ones(1, 2)}
>>> params |= {"b_1": torch.zeros(1, 2), "b_2": torch.zeros(1, 1)}
>>> round(reference(zeros, zeros, v, Config(eps=0.5), Call(params=params))[0][0, 0, 0].item(), 4)  # 2 / (1 + 1/e)
1.4621
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    carried,
    exact,
    for_products,
    heads_of,
    per_query_head,
    quotient,
    softmax_attention,
    visible,
)

NO_VALUE = "a query of another text has no value of its own beside those that it sees"


@dataclass(frozen=True)
class Config:
    expand: int = 2  # width of the MLP's middle, in widths of a value; 0: no MLP
    eps: float | None = None  # None: learned for each head, from 0
    norm_eps: float = 1e-6  # added to the mean square in the MLP's norm

    def __post_init__(self) -> None:
        require(self.expand >= 0, "expand >= 0", expand=self.expand)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, value, params = dims["heads"], dims["value"], {}
    if cfg.eps is None:
        params["eps"] = torch.zeros(heads)
    if cfg.expand:
        middle = cfg.expand * value
        params["norm"] = torch.ones(heads, middle)
        for name, rows, columns in (("1", middle, value), ("2", value, middle)):
            params[f"w_{name}"] = torch.empty(heads, rows, columns).uniform_(-1, 1) * columns**-0.5
            params[f"b_{name}"] = torch.empty(heads, rows).uniform_(-1, 1) * columns**-0.5
    return params


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    p = {name: t.double() for name, t in call.params.items()}
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) / q.shape[3] ** 0.5
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
    eps = p["eps"][:, None, None] if cfg.eps is None else cfg.eps
    x = (1 + eps) * v_h[:, :, s.shape[3] - s.shape[2] :] + quotient(e, e.sum(-1, keepdim=True)) @ v_h
    if cfg.expand:
        middle = torch.einsum("hfe,bhne->bhnf", p["w_1"], x) + p["b_1"][:, None]
        middle = middle / ((middle**2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * p["norm"][:, None]
        middle = middle / (1 + torch.exp(-middle))
        x = torch.einsum("hef,bhnf->bhne", p["w_2"], middle) + p["b_2"][:, None]
    return torch.where(sees.any(-1, keepdim=True), x, 0.0).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    square = call.pattern == "causal_self" and call.key_mask is None and call.pair_mask is None and n == m
    seen = None if square else visible(call, n, m, q.device)
    # n == m is a symbol under torch.compile with lengths that differ, and SDPA wants a bool
    causal = call.pattern == "causal_self" if square else False
    told = softmax_attention(q, k, v, scale=q.shape[3] ** -0.5, mask=seen, causal=causal)
    own = at_least_float32(per_query_head(v[:, :, m - n :], q.shape[1]))
    eps = cfg.eps if cfg.eps is not None else call.params["eps"].to(own.dtype)[:, None, None]
    x = ((1 + eps) * own + told).to(v.dtype)
    x = gin(x, call, cfg) if cfg.expand else x
    x = x.to(v.dtype)
    return x if seen is None else x.masked_fill(~seen.any(-1, keepdim=True), 0), state


def gin(x: Tensor, call: Call, cfg: Config) -> Tensor:
    """The MLP of each head on x [B, H, N, E]: products in the dtype of x if it is multiplied, the norm in float32."""
    (x,) = for_products(x)
    w_1, b_1, w_2, b_2 = (call.params[name].to(x.dtype) for name in ("w_1", "b_1", "w_2", "b_2"))
    middle = at_least_float32(x @ w_1.mT + b_1[:, None])
    spread = (middle.square().mean(-1, keepdim=True) + cfg.norm_eps).rsqrt()
    middle = torch.nn.functional.silu(middle * spread * call.params["norm"].to(middle.dtype)[:, None])
    return middle.to(x.dtype) @ w_2.mT + b_2[:, None]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self", "causal_self"),
    unsupported={"cross": NO_VALUE, "causal_cross": NO_VALUE},
    pair_masks=True,
    test_settings=({"expand": 1, "eps": 0.5}, {"expand": 0}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Graph-aware isomorphic attention (GIN-Attention)",
        paper="Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers, arXiv:2501.02393",
        year=2025,
        idea="attention weights are a graph's edges; a graph isomorphism network of each head aggregates over them",
        cost="O(N·M·(D + E)) time and N·expand·E² for the MLP of each head; the N × M weights are never held",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"eps": -1.0, "expand": 0},
        caveat=(
            "the paper's GIN weighs a token's own value by 1 + ε; its code has ε alone, from 0, and so begins at MLP(A "
            "V). The code aggregates slices of the layer's input, without a value projection, and by default projects "
            "no output; here v is what the layer gives, the identity for that. Dropout in the MLP, sharpened, "
            "thresholded and differential A, and the code's unscored variants are left out, and so are PNA attention "
            "(sum, mean, maximum and variance over A) and the Sparse-GIN adapter: a frozen layer's A summed over "
            "heads, clipped at 1, through σ(10(a - 1/2)) with what is at or below 1/2 cut, whose GIN of the hidden "
            "states is added after attention"
        ),
    ),
)
