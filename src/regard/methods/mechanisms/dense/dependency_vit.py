"""Reversed attention: a token asks which tokens are its parents, and sends them its value instead of reading theirs.

    A_ij^h = softmax_j(q_i·k_j / √D)             child i spreads one message over its parents j, head by head
    P_i    = softmax over heads of W_p x_i / τ    head selector: by which head a token's message goes
    M_i    = σ(W_2 gelu(W_1 x_i))                 message controller: how much of it is sent
    Y_j^h  = Σ_i M_i P_i^h A_ij^h v_i^h           Y = Aᵀ V where both are left out

In forward attention a row says how much a token takes; here the same row says how much it gives, and giving adds up to
one: messages are neither lost nor doubled, Σ_j Y_j = Σ_i M_i P_i v_i. Nothing says that a token receives anything. So
dependencies point one way: the parent of a token is where most of its message goes (`parents`), and a token that sends
little, by M in aux["sent"], is a leaf that a model may do without.

Worked by hand: one head, queries 0 and log 3, keys 0 and 1, values 2 and 4. The first token gives both half of its 2,
the second a quarter of its 4 to the first and the rest to itself: outputs 1 + 1 and 1 + 3, which add up to 6 = 2 + 4.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([0.0, math.log(3)], [0.0, 1.0], [2.0, 4.0]))
>>> out, _, _ = reference(q, k, v, Config(temperature=None, controller=False), Call("self"))
>>> [round(y, 4) for y in out.flatten().tolist()]
[2.0, 4.0]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    carried,
    exact,
    heads_of,
    masked_softmax,
    matmul,
    per_query_head,
    product_dtype,
    quotient,
    row_blocks,
    scores,
    shown,
)


@dataclass(frozen=True)
class Config:
    temperature: float | None = 0.1  # τ of the head selector; None: every head carries every message
    controller: bool = True  # whether tokens learn how much they send; else all of it
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(
            self.temperature is None or self.temperature > 0, "temperature > 0", temperature=self.temperature
        )


def reads_x(cfg: Config) -> bool:
    return cfg.temperature is not None or cfg.controller


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    width, inner = dims["width"], max(1, dims["width"] // 2)
    shapes = {"selector": (dims["heads"], width)} if cfg.temperature is not None else {}
    shapes |= {"message_in": (inner, width), "message_out": (1, inner)} if cfg.controller else {}
    return {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict]:
    batch, heads, n, width = q.shape
    there = q.new_ones(batch, heads, n, dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    # a token that is hidden neither sends nor receives
    q_h, k_h, v_h = (torch.where(there[..., None], t, 0.0) for t in (q_h, k_h, v_h))
    s = torch.einsum("bhid,bhjd->bhij", q_h, k_h) * (width**-0.5 if cfg.scale is None else cfg.scale)
    s = s.masked_fill(~there[:, :, None], -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    a = quotient(e, e.sum(-1, keepdim=True))  # [B, H, child, parent]
    m, p = there.any(1).double(), there.double()
    x = None if call.x is None else torch.where(there.any(1)[..., None], call.x_of_keys.double(), 0.0)
    if cfg.controller:
        z = torch.einsum("bnc,ic->bni", x, call.params["message_in"].double())
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        m = m / (1 + torch.exp(-torch.einsum("bni,oi->bn", z, call.params["message_out"].double())))
    if cfg.temperature is not None:
        z = torch.einsum("bnc,hc->bhn", x, call.params["selector"].double()) / cfg.temperature
        p = p * z.softmax(1)
    return torch.einsum("bn,bhn,bhnj,bhne->bhje", m, p, a, v_h).to(v.dtype), None, {"sent": m}


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict]:
    q, (k, v, _) = shown(q, call.key_mask), carried(k, v, call)
    gates, sent = gates_of(q, cfg, call)
    v = per_query_head(v, q.shape[1])
    out = at_least_float32(v.new_zeros(*q.shape[:3], v.shape[3]))
    for rows, a in spread(q, k, cfg, call):
        messages = (a * gates[:, :, rows, None]).to(product_dtype(v))
        out = out + at_least_float32(matmul(messages.mT, v[:, :, rows]))
    return out.to(v.dtype), None, {"sent": sent}


def spread(q: Tensor, k: Tensor, cfg: Config, call: Call) -> Iterator[tuple[slice, Tensor]]:
    """(children, [B, H, children, N] the shares that their parents get), a block of children at a time."""
    batch, heads, n, width = q.shape
    seen = None if call.key_mask is None else call.key_mask[:, :, None]
    scale = width**-0.5 if cfg.scale is None else cfg.scale
    for rows in row_blocks(n, batch * heads * n):
        yield rows, masked_softmax(scores(q[:, :, rows], k, scale), seen)


def gates_of(q: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """([B, H|1, N] M·P, [B, N] M) in float32 at least; zeros where a token is hidden."""
    there, m = call.key_mask, at_least_float32(q.new_ones(q.shape[0], q.shape[2]))
    hidden = None if there is None else ~there.any(1)
    m = m if hidden is None else m.masked_fill(hidden, 0)
    if not reads_x(cfg):
        return m[:, None], m
    x = at_least_float32(call.x_of_keys)
    x = x if hidden is None else x.masked_fill(hidden[..., None], 0)
    learned = {name: w.to(x.dtype) for name, w in call.params.items()}
    if cfg.controller:
        m = m * linear(gelu(linear(x, learned["message_in"])), learned["message_out"])[..., 0].sigmoid()
    if cfg.temperature is None:
        return m[:, None], m
    return m[:, None] * (linear(x, learned["selector"]) / cfg.temperature).softmax(-1).mT, m


def parents(q: Q, k: K, cfg: Config, call: Call) -> Tensor:
    """[B, N] to which token the most of a token's messages goes, all heads together; -1 for a hidden one.

    A token that is its own parent is a root.
    """
    q, (k, _, _) = shown(q, call.key_mask), carried(k, k, call)
    gates = gates_of(q, cfg, call)[0]
    found = [(a * gates[:, :, rows, None]).sum(1).argmax(-1) for rows, a in spread(q, k, cfg, call)]
    there = True if call.key_mask is None else call.key_mask.any(1)
    return torch.cat(found, 1).where(torch.as_tensor(there, device=q.device), -1)


def reversed_softmax(q: Q, k: K, v: V, call: Call) -> Out:
    """Aᵀ V."""
    a = masked_softmax(scores(q, k, q.shape[3] ** -0.5))
    return a.mT @ per_query_head(v, q.shape[1])


OWN = "a child's message is the value beside its query; the values of a memory stand beside keys"
ENDS = "a message is divided among all tokens, those to come too, or parents would hear of later children"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported={"causal_self": ENDS, "cross": OWN, "causal_cross": OWN},
    needs_x=reads_x,
    test_settings=(
        {"temperature": None, "controller": False, "scale": 0.4},
        {"temperature": None},
        {"controller": False, "temperature": 0.5},
    ),
    neutral_base=reversed_softmax,
    exempt={
        "queries": "a query says to whom its token's message goes, so it moves the outputs of others",
        "heads_alone": "the selector divides a token's message among the heads",
    },
    card=Card(
        title="Reversed attention (DependencyViT)",
        paper=(
            "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention, arXiv:2304.03282"
        ),
        year=2023,
        idea="a row of attention says where a token's own value goes; a head selector and a gate say how and how much",
        cost="O(N²·(D + E)) time; weights exist for a block of children at a time",
        state="none: a whole image at once",
        needs=("qkv", "x", "vit"),
        lineage=("softmax",),
        neutral={"temperature": None, "controller": False},
        caveat=(
            "the paper's repository holds a licence only; the placement of selector and controller (both on the "
            "sender, no biases, C/2 hidden units, τ = 0.1) is that of a third party's unfinished code, which agrees "
            "with the paper's figure. There the controller's gates multiply from layer to layer, and weigh the tokens "
            "in the last mean: a layer alone has only its own, aux['sent'], so multiply values by the product of "
            "those before. A token may receive nothing: keep the residual. That code prunes by what tokens receive; "
            "the paper says those that rarely send, as here. N·N weights are kept for gradients"
        ),
    ),
)
