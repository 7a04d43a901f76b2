"""Gated linear attention: every key channel of the state forgets at a rate that the token itself decides.

    S_t = (α_tᵀ 1) ⊙ S_{t-1} + k_tᵀ v_t               α_t in (0, 1)^D, one rate per channel of the keys
    o_t = q_t S_t
    α_t = sigmoid(x_t W₁ W₂ + b)^(1/τ)                 W₁ [C, 16] and W₂ [16, D] of low rank, τ = 16

The root τ keeps α near 1, so that a fresh layer forgets slowly: sigmoid(0)^(1/16) = 2^(-1/16) = 0.958. There is no
denominator: a norm per head follows. In self a token weighs by the gates between itself and the query on both sides; in
cross and causal_cross every query reads the state that the whole memory has left, gates being those of its tokens.

Worked by hand: zero weights give α = 2^(-1/τ); with τ = 1 a value of one step ago counts half.

>>> one = torch.ones(1, 1, 2, 1)
>>> params = {"down": torch.zeros(1, 16), "up": torch.zeros(16, 1, 1), "bias": torch.zeros(1, 1)}
>>> reference(one, one, one, Config(tau=1.0), params=params, x=one[0])[0].flatten().tolist()
[1.0, 1.5]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Mechanism, Out, Q, V, require
from regard.core.shapes import PATTERNS
from regard.ops import (
    at_least_float32,
    dense_linear,
    inputs_of_keys,
    linear,
    per_query_head,
    undecayed,
)


@dataclass(frozen=True)
class Config:
    rank: int = 16
    tau: float = 16.0  # larger forgets more slowly; infinity: never
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank >= 1", rank=self.rank)
        require(self.tau > 0, "tau > 0", tau=self.tau)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """W₁, W₂ and b, the latter two for each KV head."""
    heads, key, width = dims["kv_heads"], dims["key"], dims["width"]
    up = torch.randn(cfg.rank, heads, key) * cfg.rank**-0.5
    return {"down": torch.randn(width, cfg.rank) * width**-0.5, "up": up, "bias": torch.zeros(heads, key)}


def log_gates(q: Q, k: K, cfg: Config, params: dict | None, x, pattern: str) -> Tensor:
    """[B, H, M, D] log α of the keys."""
    x = inputs_of_keys(x, pattern)
    require(params is not None, "the gates need params: what init gave")
    require(x is not None and x.shape[1] == k.shape[2], "x [B, M, C] stands beside the keys", keys=k.shape[2])
    x = at_least_float32(x)
    low = x @ params["down"].to(x.dtype)
    z = torch.einsum("bmr,rgd->bgmd", low, params["up"].to(x.dtype)) + params["bias"].to(x.dtype)[:, None]
    return per_query_head(F.logsigmoid(z) / cfg.tau, q.shape[1]).expand(-1, q.shape[1], -1, -1)


def reference(
    q: Q, k: K, v: V, cfg: Config, *, pattern="causal_self", params=None, x=None, **told
) -> tuple[Out, Tensor | None]:
    return dense_linear(q, k, v, log_gates(q, k, cfg, params, x, pattern), pattern=pattern, **told)


def fast(
    q: Q, k: K, v: V, cfg: Config, *, pattern="causal_self", params=None, x=None, **told
) -> tuple[Out, Tensor | None]:
    gates = log_gates(q, k, cfg, params, x, pattern)
    return linear(q, k, v, gates, pattern=pattern, chunk=cfg.chunk, **told)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    ordered=True,
    patterns=PATTERNS,
    x=True,
    normed=True,
    speed=("chunk",),
    tries=({"rank": 2, "tau": 1.0},),
    base=undecayed,
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    card=Card(
        title="Gated linear attention (GLA)",
        paper="Gated Linear Attention Transformers with Hardware-Efficient Training (2023)",
        year=2023,
        idea="the token's own content decides how fast every channel of the state forgets",
        cost="O((N + M)·(C·D + D·E)) time for chunks of C tokens",
        state="D·E numbers per head, whatever the length",
        needs=("qkv", "layer input"),
        lineage=("linear_attention", "retention"),
        caveat="released code scales queries by 1/√D, which the norm that follows takes out; that norm is the layer's",
        neutral={"tau": float("inf")},
    ),
)
