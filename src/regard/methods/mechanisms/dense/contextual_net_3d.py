"""ConTEXTual Net 3D: each place of an image asks the tokens of a sentence, and what it reads gates its features.

    a_ij = softmax_j(q_i·k_j / √D)          place i of an image or a volume, token j of a sentence
    g_i  = tanh(W_o Σ_j a_ij v_j + b_o)     between -1 and 1, for each channel
    o_i  = (W_x x_i) ⊙ g_i                  x the features of the places, from which q is made

W_o, b_o and W_x are learned for each head; W_x begins as the identity of the layer's channels, and with it the gate is
on the features as they are, as the paper has it. Nothing is added: what a sentence does not ask for can be closed. A
sentence that is pooled to one vector closes the same channels everywhere; here each place reads the tokens that speak
of what it shows. Places are a set, so that axes of the image do not matter.

Worked by hand: W_o and W_x are 1. Two tokens with the values atanh(1/2) and 0; the first place has scores log 3 and 0,
so it reads 3/4 of the first: tanh(3/4 · 0.5493) = 0.3902. The second place has scores 0: tanh(1/2 · 0.5493) = 0.2679.

>>> import math
>>> q, k = torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
>>> params = {"features": torch.ones(1, 1, 1), "out": torch.ones(1, 1, 1), "out_bias": torch.zeros(1, 1)}
>>> x = torch.tensor([1.0, 10.0]).view(1, 2, 1)
>>> call = Call("cross", params=params, x=(x, x))
>>> [round(o, 4) for o in reference(q, k, k * math.atanh(0.5), Config(), call)[0].flatten().tolist()]
[0.3902, 2.6795]
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, exact, heads_of, quotient, softmax_attention, visible

GATES = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}


@dataclass(frozen=True)
class Config:
    # tanh: gates of -1 to 1; sigmoid: of 0 to 1; relu: of 0 and more
    gate: Literal["tanh", "sigmoid", "relu"] = "tanh"
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.gate in GATES, f"gate is one of {tuple(GATES)}", gate=self.gate)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """Channels of x are those of the heads, one after the other; W_o as torch's own layers begin."""
    heads, e = dims["heads"], dims["value"]
    return {
        "features": torch.eye(heads * e, dims["width"]).unflatten(0, (heads, e)),
        "out": torch.empty(heads, e, e).uniform_(-1, 1) * e**-0.5,
        "out_bias": torch.zeros(heads, e),
    }


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict[str, Tensor]]:
    k, v, _ = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    x, w_x, w_o, b_o = exact(call.x_of_queries, *(call.params[n] for n in ("features", "out", "out_bias")))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * (q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale)
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    s = s.masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    read = quotient(e @ v_h, e.sum(-1, keepdim=True))  # [B, H, N, E]
    logits = torch.einsum("bhne,hfe->bhnf", read, w_o) + b_o[:, None]
    if cfg.gate == "tanh":
        gate = 2 * (2 * logits).sigmoid() - 1
    else:
        gate = (1 + (logits / 2).tanh()) / 2 if cfg.gate == "sigmoid" else logits.clamp(min=0)
    gate = gate * sees.any(-1, keepdim=True)
    out = torch.einsum("bnc,hec->bhne", x, w_x) * gate
    return out.to(v.dtype), None, {"gate": gate.to(v.dtype)}


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict[str, Tensor]]:
    k, v, _ = carried(k, v, call)
    seen = visible(call, q.shape[2], k.shape[2], q.device)
    scale = q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale
    read = at_least_float32(softmax_attention(q, k, v, scale=scale, mask=seen))
    w_x, w_o, b_o = (call.params[n].to(read.dtype) for n in ("features", "out", "out_bias"))
    gate = GATES[cfg.gate](read @ w_o.mT + b_o[:, None])
    if seen is not None:
        gate = gate.masked_fill(~seen.any(-1, keepdim=True), 0)
    features = call.x_of_queries.to(read.dtype)[:, None] @ w_x.mT  # [B, H, N, E]
    return (features * gate).to(v.dtype), None, {"gate": gate.to(v.dtype)}


OWN = "places of an image ask the tokens of a sentence, which are another text"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("cross", "causal_cross"),
    unsupported=dict.fromkeys(("self", "causal_self"), OWN),
    pair_masks=True,
    needs_x=True,
    test_settings=({"gate": "sigmoid", "scale": 0.4}, {"gate": "relu"}),
    exempt={"neutral": "the gate is on the features: no setting leaves the values that were read"},
    card=Card(
        title="ConTEXTual Net 3D: cross-attention to a sentence as a gate",
        paper="Vision-Language Modeling in PET/CT for Visual Grounding of Positive Findings (2025)",
        year=2025,
        idea="places of an image ask the tokens of a sentence; tanh of what they read gates the places' features",
        cost="O(N·M·(D + E) + N·E·(C + E)) time for N places and M tokens",
        state="none: whole images and sentences at once",
        needs=("layer input", "cnn-features", "text-only"),
        lineage=("softmax", "ConTEXTual Net (2023)"),
        caveat=(
            "a mechanism for cross, whose output is the input at the queries, gated; values stand in the gate alone. "
            "The paper gates features as they are, with one head: that is W_x of the identity, which an attention "
            "layer of one head begins with and then learns. Several heads have a gate each. Queries, keys and values "
            "are projected by the caller. In the released code the upsampled features of the three coarsest levels of "
            "a decoder (192, 128 and 96 channels) are gated before the skip is joined to them; its 2.5-D model gates "
            "skips. It pads sentences to one length and lets places read the padding; here a mask hides it, and a "
            "place that sees no token is zero. sigmoid and relu are its commented alternatives to tanh. The network, "
            "the language model and the weak labels are not here"
        ),
    ),
)
