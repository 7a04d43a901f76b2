"""Lightning Attention-2: causal linear attention with one fixed decay per head, computed block by block.

    S_t = λ_h S_{t-1} + k_tᵀ v_t        a [D, E] state per head
    o_t = q_t S_t                       neither a denominator nor a scale: the block norms o
    λ_h = exp(-8h/H · (1 - l/L))        head h of H, layer l of L, both counted from 0

In blocks: O = [(Q Kᵀ) ⊙ M] V + Λ Q S with M_ts = λ^(t-s), then S <- λ^B S + (λ^B Λ⁻¹ K)ᵀ V, where Λ = diag(λ, .., λ^B).
Every power is taken from a difference of exponents that is at least 0: Λ⁻¹ alone overflows. The cost of a token is the
same wherever it stands. In self a token weighs by its distance on both sides; in cross and causal_cross every query
reads the state that the whole memory has left, as if it came right after it.

Worked by hand: head 1 of 2 in layer 1 of 2 has λ = exp(-8·1/2 · 1/2) = e⁻²; released code: slope 2⁻⁸, and a last layer
that hardly decays: 2⁻⁸ · (1 - 1/1 + 10⁻⁵).

>>> log_decay(torch.empty(1, 2, 1, 1), Config(layer=1, layers=2)).tolist()
[-0.0, -2.0]
>>> q = k = v = torch.ones(1, 2, 2, 1)
>>> round(reference(q, k, v, Config(layer=1, layers=2), Call())[0][0, 1, 1].item(), 6)  # 1 + e⁻²
1.135335
>>> log_decay(q, Config("slopes", layer=1, layers=2)).mul(2**8 * 1e5).tolist()  # heads have slopes 2⁻⁴ and 2⁻⁸
[-16.0, -1.0]
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, exact, heads_of, initial, recurrence, rounded, undecayed
from regard.ops.lightning import DECAYS, layer_decay


@dataclass(frozen=True)
class Config:
    # or "slopes", that of the released models, or "none", the kernel without decay
    decay: Literal["paper", "slopes", "none"] = "paper"
    layer: int = 0  # l, from 0; higher ones forget more slowly
    layers: int = 1  # L, of the model
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.decay in (*DECAYS, "none"), f"decay is one of {DECAYS} or none", decay=self.decay)
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def decay_of(h: int, heads: int, cfg: Config) -> float:
    """λ of head h, for the reference."""
    if cfg.decay == "none":
        return 1.0
    if cfg.decay == "paper":
        return math.exp(-8 * h / heads * (1 - cfg.layer / cfg.layers))
    power = 1 << (heads.bit_length() - 1)
    # ALiBi: of heads beyond a power of two, every second one of the next power
    exponent = 8 * (h + 1) / power if h < power else 8 * (2 * (h - power) + 1) / (2 * power)
    return math.exp(-(2**-exponent) * (1 - cfg.layer / max(cfg.layers - 1, 1) + 1e-5))


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    lam = q_h.new_tensor([decay_of(h, heads, cfg) for h in range(heads)]).view(-1, 1, 1)

    def write(s: Tensor, t: int) -> Tensor:
        return lam * s + k_h[:, :, t, :, None] * v_h[:, :, t, None]

    def read(s: Tensor, i: int) -> Tensor:
        return torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3])
    return rounded(*recurrence(s, write, read, n, m, call, two_sided=True), v)


def log_decay(q: Q, cfg: Config) -> Tensor | None:
    """[H] log λ, in float32 at least; None: no decay."""
    return None if cfg.decay == "none" else layer_decay(q, cfg.decay, cfg.layer, cfg.layers)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    return Form(q, k, v, log_decay(q, cfg), state=call.initial_state)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    order_aware=True,
    patterns=PATTERNS,
    needs_norm=True,
    speed_settings=("chunk",),
    test_settings=(dict(layer=1, layers=2), dict(decay="slopes", layer=1, layers=3), dict(decay="none")),
    neutral_base=undecayed,
    exempt={"heads_alone": "a head's decay follows from its number"},
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    card=Card(
        title="Lightning Attention-2",
        paper="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in LLMs (2024)",
        year=2024,
        idea="linear attention with a fixed decay per head, quadratic inside a block and recurrent between blocks",
        cost="O((N + M)·(C·D + D·E)) time for blocks of C tokens",
        state="D·E numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("linear_attention", "retention"),
        caveat=(
            "the paper does not say from where it counts heads and layers: from 0 here, so head 0 never forgets and "
            "its state grows with the text. Released models use ALiBi-like slopes and (1 - l/(L-1) + 1e-5) instead: "
            'decay="slopes"; with one layer, where that divides by zero, the factor is 1 here'
        ),
        neutral={"decay": "none"},
    ),
)
