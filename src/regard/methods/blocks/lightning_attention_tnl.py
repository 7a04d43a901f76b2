"""TNL's layer: gated linear attention with decay, then a gated linear unit without an activation.

    x <- x + GLA(SRMSNorm(x)),   GLA(x) = [SRMSNorm((φ(x W_q) φ(x W_k)ᵀ ⊙ M) x W_v) ⊙ x W_u] W_o,   φ = Swish
    x <- x + SGLU(SRMSNorm(x)),  SGLU(x) = [x V ⊙ x U] W
    SRMSNorm(x) = x / (‖x‖ / √d), without a weight; inside GLA over the channels of all heads
    M_ts = λ^(t-s) for s <= t, else 0;  λ_h = exp(-8h/H · (1 - l/L)), head h of H, layer l of L, both from 0
    layer 0 only: M_ts is also times cos(θ_c (t-s)) for channel c of the keys (LRPE), with learned θ [H, D]

Lower layers forget faster, so that early layers are local and the last ones see far; there is no other position. The
state S_t = λ S_{t-1} + φ(k_t)ᵀ v_t is all that is kept of a text. In layer 0 it has a part that goes with cos and one
that goes with sin, and stands in the frame of its last token.

Worked by hand: C = H = 1 and all weights 1. SRMSNorm(±2) = ±1, so GLA(x) = 1 · 1 and x becomes 3; SGLU gives 1: 4.

>>> params = {n: torch.ones(p.shape) for n, p in init(Config(units=1), {"width": 1, "heads": 1}).items()}
>>> round(reference(torch.full((1, 1, 1), 2.0), Config(units=1), Call(params=params))[0].item(), 4)
4.0
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, initial, linear, rounded
from regard.ops.lightning import DECAYS, layer_decay, waves_moved, with_waves


@dataclass(frozen=True)
class Config:
    decay: Literal["paper", "slopes"] = "paper"  # or "slopes", that of the released models
    layer: int = 0  # l, from 0; higher ones forget more slowly, and 0 alone has LRPE
    layers: int = 1  # L, of the model
    # of the SGLU; None: 7/3 of the width, 12·C² weights a layer as in a usual transformer
    units: int | None = None
    eps: float = 1e-6  # of the norms, beside the mean square
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.decay in DECAYS, f"decay is one of {DECAYS}", decay=self.decay)
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)
        require(self.units is None or self.units >= 1, "units >= 1", units=self.units)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    width, heads = dims["width"], dims["heads"]
    require(width % heads == 0, "the width is a multiple of the heads", width=width, heads=heads)
    units = cfg.units or round(width * 7 / 3)
    shapes = {"qkvu": (width, 4, heads, width // heads), "out": (width, width)}
    shapes |= {"vu": (width, 2, units), "down": (units, width)}
    params = {name: torch.randn(shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    if cfg.layer == 0:
        params["theta"] = (10000 ** (-2 * torch.arange(width) / width)).view(heads, -1)
    return params


def decay_of(h: int, heads: int, cfg: Config) -> float:
    """λ of head h, for the reference."""
    if cfg.decay == "paper":
        return math.exp(-8 * h / heads * (1 - cfg.layer / cfg.layers))
    power = 1 << (heads.bit_length() - 1)
    # ALiBi: of heads beyond a power of two, every second one of the next power
    exponent = 8 * (h + 1) / power if h < power else 8 * (2 * (h - power) + 1) / (2 * power)
    return math.exp(-(2**-exponent) * (1 - cfg.layer / max(cfg.layers - 1, 1) + 1e-5))


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    def srms(t: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + cfg.eps).sqrt()

    params = {name: p.double() for name, p in call.params.items()}
    y = x.double()
    q, k, v, u = torch.einsum("bnc,cphd->pbhnd", srms(y), params["qkvu"])
    o, end = decayed_sums(q * q.sigmoid(), k * k.sigmoid(), v, params, cfg, call)
    o, u = (t.transpose(1, 2).flatten(2) for t in (o, u))
    y = y + (srms(o) * u) @ params["out"]
    value, gate = (srms(y) @ params["vu"][:, part] for part in (0, 1))
    return rounded(y + (value * gate) @ params["down"], end, x)


def decayed_sums(q, k, v, params: dict, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """Σ_{s<=t} M_ts φ(q_t) φ(k_s)ᵀ v_s and the state; q and k come as φ of them.

    The state is the same sum over keys alone, t the last token, with e^{iθ(s-t)}, in layer 0 real and imaginary part.
    """
    heads, n, width = q.shape[1:]
    lam = q.new_tensor([decay_of(h, heads, cfg) for h in range(heads)]).view(-1, 1, 1)
    theta = params["theta"] if cfg.layer == 0 else q.new_zeros(heads, width)
    token_mask = (
        torch.ones(1, 1, n, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    )
    k, v = (x.masked_fill(~token_mask[..., None], 0) for x in (k, v))
    # tokens are counted from 1, padding not at all; a state that comes in stands at 0
    t = token_mask.double().cumsum(-1)
    age = t[..., None] - t[..., None, :]  # t - s: [B|1, 1, N, N]
    faded = (lam ** age.abs()).masked_fill(age < 0, 0)
    waved = (theta[:, None, None] * age[..., None]).cos()
    out = torch.einsum("bhtc,bhsc,bhts,bhtsc->bhts", q, k, faded, waved) @ v

    def factor(age: Tensor) -> Tensor:
        """[B|1, H, n, D] λ^age e^{iθ age}"""
        return (lam ** age[..., None]) * (1j * theta[:, None] * age[..., None]).exp()

    parts = 2 if cfg.layer == 0 else 1
    old = initial(call, q, len(q), heads, parts * width, v.shape[3])
    old = torch.complex(*old.chunk(2, dim=2)) if cfg.layer == 0 else old + 0j
    left = (k * factor(t[..., -1:] - t).conj()).mT @ (v + 0j)
    end = left + factor(t[..., -1:]).conj().mT * old
    return out + ((q * factor(t)) @ old.conj()).real, torch.cat([end.real, end.imag][:parts], dim=2)


def norm(x: Tensor, eps: float) -> Tensor:
    full = at_least_float32(x)
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor | None]:
    dtype, (x,) = x.dtype, for_products(x)
    weights = {name: p.to(x.dtype) for name, p in call.params.items() if name != "theta"}
    q, k, v, u = torch.einsum("bnc,cphd->pbhnd", norm(x, cfg.eps), weights["qkvu"])
    o, end = mixed(q, k, v, cfg, call)
    o = norm(o.transpose(1, 2).flatten(2), cfg.eps).to(x.dtype)  # [B, N, C]
    x = x + (o * u.transpose(1, 2).flatten(2)) @ weights["out"]
    value, gate = torch.einsum("bnc,cpu->pbnu", norm(x, cfg.eps), weights["vu"])
    return (x + (value * gate) @ weights["down"]).to(dtype), end


def mixed(q: Tensor, k: Tensor, v: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor | None]:
    """The sums over earlier tokens, and the state at the last one, for fast."""
    q, k, v = F.silu(at_least_float32(q)), F.silu(at_least_float32(k)), at_least_float32(v)
    decay = layer_decay(q, cfg.decay, cfg.layer, cfg.layers)
    if cfg.layer == 0:
        theta = call.params["theta"].to(q.dtype)
        q, k, last = with_waves(q, k, theta, call)
    out, end = linear(
        q, k, v, decay, key_mask=call.key_mask, state=call.initial_state, chunk=cfg.chunk, backend=call.backend
    )  # fmt: skip
    return out, waves_moved(end, last, theta) if cfg.layer == 0 and end is not None else end


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("causal_self",),
    speed_settings=("chunk",),
    test_settings=({"units": 3, "chunk": 5}, {"decay": "slopes"}),
    state_size=lambda cfg, dims, n: (1 if cfg.layer else 2) * dims["width"] ** 2 // dims["heads"],
    card=Card(
        title="TNL's layer (Lightning Attention)",
        paper="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024)",
        year=2024,
        idea="decayed linear attention between norms and gates that need no activation and no denominator",
        cost="O(N·C·(C + chunk)) time",
        state="2·C²/H numbers in layer 0, C²/H in the others, whatever the length",
        needs=("decoder",),
        lineage=("lightning_attention_2", "transnormerllm"),
        caveat=(
            "the paper does not say from where it counts heads and layers: "
            "from 0 here, so head 0 never forgets; the released model uses ALiBi-like slopes and (1 - l/(L-1) + 1e-5), "
            'decay="slopes". The example module of the kernel\'s repository is another layer: Swish on the values too, '
            "a LayerNorm and a sigmoid gate of low rank"
        ),
    ),
)
