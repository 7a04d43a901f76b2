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
>>> reference(one, one, one, Config(tau=1.0), Call(params=params, x=one[0]))[0].flatten().tolist()
[1.0, 1.5]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, initial, per_query_head, recurrence, rounded
from regard.ops.linear import Form, undecayed


@dataclass(frozen=True)
class Config:
    rank: int = 16  # of W₁ W₂: the numbers of a token that decide its gates
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


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    x, down, up, bias = exact(call.x_of_keys, *(call.params[name] for name in ("down", "up", "bias")))
    alpha = torch.einsum("bmc,cr,rgd->bgmd", x, down, up) + bias[:, None]
    alpha = heads_of(alpha.sigmoid() ** (1 / cfg.tau), heads)  # [B, H, M, D]

    def write(s: Tensor, t: int) -> Tensor:
        return alpha[:, :, t, :, None] * s + k_h[:, :, t, :, None] * v_h[:, :, t, None]

    def read(s: Tensor, i: int) -> Tensor:
        return torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3])
    return rounded(*recurrence(s, write, read, n, m, call, two_sided=True), v)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    x = at_least_float32(call.x_of_keys)
    low = x @ call.params["down"].to(x.dtype)
    up, bias = (call.params[name].to(x.dtype) for name in ("up", "bias"))
    z = torch.einsum("bmr,rgd->bgmd", low, up) + bias[:, None]
    gates = per_query_head(F.logsigmoid(z) / cfg.tau, q.shape[1]).expand(-1, q.shape[1], -1, -1)
    return Form(q, k, v, gates, state=call.initial_state)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    order_aware=True,
    patterns=PATTERNS,
    needs_x=True,
    needs_norm=True,
    speed_settings=("chunk",),
    test_settings=({"rank": 2, "tau": 1.0},),
    neutral_base=undecayed,
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
