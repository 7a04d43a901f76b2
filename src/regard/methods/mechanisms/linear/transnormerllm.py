"""TransNormerLLM's gated linear attention: decayed sums, a norm in place of the denominator, and a gate.

    O = SRMSNorm((φ(Q) φ(K)ᵀ ⊙ M) V) ⊙ U          φ = Swish, U = X W_u, M_ts = λ^(t-s) for s <= t, else 0
    SRMSNorm(o) = o / (‖o‖ / √d)                    over the d = H·E channels of all heads, without a weight
    λ_h = exp(-8h/H · (1 - l/L))                    head h of H, layer l of L, both counted from 0
    layer 0 only: M_ts is also times cos(θ_c (t-s)) for channel c of the keys (LRPE), with learned θ [H, D]

As a recurrence S_t = λ S_{t-1} + φ(k_t)ᵀ v_t, o_t = φ(q_t) S_t: one multiplication by λ a token. To divide by λ^t
instead, so that the sum has no decay in it, overflows as soon as t is a few hundred. In layer 0 the state has two
parts, φ(k) cos and φ(k) sin, and stands in the frame of its last token: it carries on without a count of those before.
In self a token weighs by its distance on both sides; in cross and causal_cross every query reads the state that the
whole memory has left, standing where its last token stands.

Worked by hand: one head has λ = 1; with D = 1, θ = π/3 and q = k = 1 the second row is φ(1)² (cos π/3 · 1, 3), so with
the norm over two channels and a gate of 1 it is (0.5, 3) · √2 / √9.25.

>>> q, v = torch.ones(1, 1, 2, 1), torch.tensor([[[[1.0, 0.0], [0.0, 3.0]]]])
>>> params = {"gate": torch.ones(1, 1, 2), "theta": torch.tensor([[torch.pi / 3]])}
>>> out, _ = reference(q, q, v, Config(), Call(params=params, x=torch.ones(1, 2, 1)))
>>> out[0, 0, 1].mul(9.25**0.5).round(decimals=4)
tensor([0.7071, 4.2426])
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, exact, heads_of, initial, rounded
from regard.ops.lightning import DECAYS, layer_decay, waves_moved, with_waves


@dataclass(frozen=True)
class Config:
    decay: Literal["paper", "slopes"] = "paper"  # or "slopes", that of the released models
    layer: int = 0  # l, from 0; larger: slower decay; 0 alone has the waves of LRPE
    layers: int = 1  # L, all layers of the model
    eps: float = 1e-6  # of the norm, beside the mean square
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.decay in DECAYS, f"decay is one of {DECAYS}", decay=self.decay)
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """W_u, and in layer 0 the angles θ, as in the released code from 1 down to 10000^-2 over all heads."""
    heads, key, width = dims["heads"], dims["key"], dims["width"]
    params = {"gate": torch.randn(width, heads, dims["value"]) * width**-0.5}
    if cfg.layer == 0:
        params["theta"] = (10000 ** (-2 * torch.arange(heads * key) / (heads * key))).view(heads, key)
    return params


def decay_of(h: int, heads: int, cfg: Config) -> float:
    """λ of head h, for the reference."""
    if cfg.decay == "paper":
        return math.exp(-8 * h / heads * (1 - cfg.layer / cfg.layers))
    power = 1 << (heads.bit_length() - 1)
    # ALiBi: of heads beyond a power of two, every second one of the next power
    exponent = 8 * (h + 1) / power if h < power else 8 * (2 * (h - power) + 1) / (2 * power)
    return math.exp(-(2**-exponent) * (1 - cfg.layer / max(cfg.layers - 1, 1) + 1e-5))


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    heads = q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    o, end = decayed_sums(q_h * q_h.sigmoid(), k_h * k_h.sigmoid(), v_h, cfg, call)
    o = o / (o.square().mean((1, 3), keepdim=True) + cfg.eps).sqrt()
    x, w_u = exact(call.x_of_queries[:, -q.shape[2] :], call.params["gate"])
    return rounded(o * torch.einsum("bnc,che->bhne", x, w_u), end, v)


def decayed_sums(q: Tensor, k: Tensor, v: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor | None]:
    """Σ_s M_ts φ(q_t) φ(k_s)ᵀ v_s over the keys that query t sees, and the state; q and k come as φ of them."""
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    lam = q.new_tensor([decay_of(h, heads, cfg) for h in range(heads)]).view(-1, 1, 1)
    theta = call.params["theta"].double() if cfg.layer == 0 else q.new_zeros(heads, q.shape[3])
    key_mask = (
        torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    )
    k, v = (x.masked_fill(~key_mask[..., None], 0) for x in (k, v))
    # tokens are counted from 1, hidden ones not at all; a state that comes in stands at 0
    s = key_mask.double().cumsum(-1)
    t = s[..., -1:].repeat(1, 1, n) if call.cross else s[..., m - n :]
    age = t[..., None] - s[..., None, :]  # t - s: [B|1, H|1, N, M]
    steps = age.abs()
    if call.pattern == "self":
        # what is hidden itself looks ahead from the token before it, and does not fade what it sees
        steps = steps - ((age < 0) & ~key_mask[..., None]).double()
    faded, waved = lam**steps, (theta[:, None, None] * age[..., None]).cos()
    if call.pattern == "causal_self":
        faded = faded.masked_fill(age < 0, 0)
    out = torch.einsum("bhtc,bhsc,bhts,bhtsc->bhts", q, k, faded, waved) @ v
    if call.pattern != "causal_self":
        return out, None
    before, end = carried(q, k, v, lam, theta, t, s, call)
    return out + before, end


def carried(q, k, v, lam, theta, t, s, call: Call) -> tuple[Tensor, Tensor]:
    """(what queries read of the state that came in, the state that is left), in e^{iθ(t-s)} as the paper writes it."""

    def factor(age: Tensor) -> Tensor:
        """[B|1, H, n, D] λ^age e^{iθ age}"""
        return (lam ** age[..., None]) * (1j * theta[:, None] * age[..., None]).exp()

    layer_0 = "theta" in call.params
    old = initial(call, q, len(q), q.shape[1], (1 + layer_0) * q.shape[3], v.shape[3])
    old = torch.complex(*old.chunk(2, dim=2)) if layer_0 else old + 0j
    left = (k * factor(s[..., -1:] - s).conj()).mT @ (v + 0j)
    end = left + factor(s[..., -1:]).conj().mT * old
    return ((q * factor(t)) @ old.conj()).real, torch.cat([end.real, end.imag], 2) if layer_0 else end.real


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    dtype = v.dtype
    q, k, v = F.silu(at_least_float32(q)), F.silu(at_least_float32(k)), at_least_float32(v)
    x = at_least_float32(call.x_of_queries[:, -q.shape[2] :])
    decay = layer_decay(q, cfg.decay, cfg.layer, cfg.layers)
    if cfg.layer == 0:
        theta = call.params["theta"].to(q.dtype)
        q, k, last = with_waves(q, k, theta, call)

    def finish(out: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + cfg.eps)
        out = out * torch.einsum("bnc,che->bhne", x, call.params["gate"].to(x.dtype))
        moves = cfg.layer == 0 and end is not None
        return out.to(dtype), waves_moved(end, last, theta) if moves else end

    return Form(q, k, v, decay, state=call.initial_state, finish=finish)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    order_aware=True,
    patterns=PATTERNS,
    needs_x=True,
    speed_settings=("chunk",),
    test_settings=({"layer": 1, "layers": 2}, {"decay": "slopes", "layers": 2}),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"] * (1 if cfg.layer else 2),
    exempt={
        "neutral": "the norm and the gate are part of it: no setting takes them out",
        "heads_alone": "the norm is over all heads, and a head's decay follows from its number",
    },
    card=Card(
        title="TransNormerLLM",
        paper="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer (2023)",
        year=2023,
        idea="linear attention with decay whose denominator is a norm over all heads, and a gate after it",
        cost="O((N + M)·(C·D + D·E)) time for chunks of C tokens",
        state="D·E numbers per head, 2·D·E in layer 0, whatever the length",
        needs=("qkv", "layer input"),
        lineage=("linear_attention", "lightning_attention_2"),
        caveat=(
            "the paper writes LRPE as a complex factor e^{iθ(t-s)}; the released code and this page keep its real "
            "part, which doubles the key width of layer 0. The paper does not say from where it counts heads and "
            "layers: from 0 here, so head 0 never forgets. Released models use ALiBi-like slopes and "
            '(1 - l/(L-1) + 1e-5): decay="slopes"; with one layer, where that divides by zero, the factor is 1 here'
        ),
    ),
)
