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
>>> round(reference(q, k, v, Config(layer=1, layers=2))[0][0, 1, 1].item(), 6)  # 1 + e⁻²
1.135335
>>> log_decay(q, Config("slopes", layer=1, layers=2)).mul(2**8 * 1e5).tolist()  # heads have slopes 2⁻⁴ and 2⁻⁸
[-16.0, -1.0]
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, K, Mechanism, Out, Q, V, require
from regard.core.shapes import PATTERNS
from regard.ops import dense_linear, linear, undecayed
from regard.ops.lightning import DECAYS, layer_decay


@dataclass(frozen=True)
class Config:
    decay: str = "paper"  # or "slopes", that of the released models, or "none", the kernel without decay
    layer: int = 0
    layers: int = 1
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.decay in (*DECAYS, "none"), f"decay is one of {DECAYS} or none", decay=self.decay)
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def log_decay(q: Q, cfg: Config) -> Tensor | None:
    """[H] log λ, in float32 at least; None: no decay."""
    return None if cfg.decay == "none" else layer_decay(q, cfg.decay, cfg.layer, cfg.layers)


def reference(q: Q, k: K, v: V, cfg: Config, *, params=None, x=None, **told) -> tuple[Out, Tensor | None]:
    return dense_linear(q, k, v, log_decay(q, cfg), **told)


def fast(q: Q, k: K, v: V, cfg: Config, *, params=None, x=None, **told) -> tuple[Out, Tensor | None]:
    return linear(q, k, v, log_decay(q, cfg), chunk=cfg.chunk, **told)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    ordered=True,
    patterns=PATTERNS,
    normed=True,
    speed=("chunk",),
    tries=({"layer": 1, "layers": 2}, {"decay": "slopes", "layer": 1, "layers": 3}, {"decay": "none"}),
    base=undecayed,
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
