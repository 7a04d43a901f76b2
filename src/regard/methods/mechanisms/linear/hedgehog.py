"""Hedgehog: linear attention whose feature map is trained until its weights are those of softmax attention.

    φ(x) = softmax([xW, -xW])               2F features; one W [D, F] for queries and one for keys, in each head
    S_t = S_{t-1} + φ(k_t)ᵀ v_t             z_t = z_{t-1} + φ(k_t)
    o_t = φ(q_t) S_t / (φ(q_t) z_t)         feature="exp": φ(x) = exp([xW, -xW])

Softmax weights are spiky and grow with q·k; those of fixed positive maps are flat. An exponential per feature brings
the spikes back, W learns where they stand: it begins as the identity and is fitted to the cross-entropy of the softmax
weights against Σ_j φ(q)φ(k_j) (regard.train.convert does this), then the whole model is fine-tuned.

Worked by hand: D = F = 1, W = 1. A query 0 has features (1/2, 1/2), so its weights are equal whatever the keys are; a
query log 2 has (4, 1)/5, keys 0 and log 2 have (1/2, 1/2) and (4, 1)/5, products 1/2 and 17/25: the second gets 34/59.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([math.log(2)], [0.0, math.log(2)], [0.0, 59.0]))
>>> params = init(Config(), {"heads": 1, "kv_heads": 1, "key": 1})
>>> round(reference(q, k, v, Config(), Call("cross", params=params))[0].item(), 3)
34.0
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    Form,
    at_least_float32,
    exact,
    heads_of,
    initial,
    per_query_head,
    quotient,
    recurrence,
    rounded,
)

FEATURES = ("softmax", "exp")


@dataclass(frozen=True)
class Config:
    feature: Literal["softmax", "exp"] = (
        "softmax"  # over the features, as the paper computes it; "exp": without their sum
    )
    width: int | None = None  # F; None: as wide as the keys
    limit: float = 20.0  # with "exp", |xW| of a key counts as at most this, so that sums stay finite
    eps: float = 1e-12  # added to the denominator
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.feature in FEATURES, f"feature is one of {FEATURES}", feature=self.feature)
        require(self.width is None or self.width >= 1, "width >= 1", width=self.width)
        require(0 < self.limit <= 40, "0 < limit <= 40", limit=self.limit)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    eye = torch.eye(dims["key"], cfg.width or dims["key"])
    return {f"w_{n}": eye.repeat(dims[h], 1, 1) for n, h in (("q", "heads"), ("k", "kv_heads"))}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, (heads, groups) = q.shape[2], k.shape[2], (q.shape[1], k.shape[1])
    w_q, w_k, q_h, k_g, v_g = exact(call.params["w_q"], call.params["w_k"], q, k, v)
    # one state for each KV head, unless query heads differ in the keys hidden from them, now or before
    masked = call.key_mask is not None and call.key_mask.shape[1] > 1
    divided = call.initial_state is not None and call.initial_state.shape[1] > groups
    held = heads if masked or divided else groups

    def phi(x: Tensor, w: Tensor, of_query: bool) -> Tensor:
        y = torch.einsum("bhd,hdf->bhf", x, w)
        y = torch.cat([y, -y], dim=-1)
        if cfg.feature == "softmax":
            return (y - y.logsumexp(-1, keepdim=True)).exp()
        # a factor that all features of a query share cancels
        return (y - y.amax(-1, keepdim=True) if of_query else y.clamp(-cfg.limit, cfg.limit)).exp()

    def write(state: tuple, t: int) -> tuple:
        s, z = state
        key, value = heads_of(phi(k_g[:, :, t], w_k, False), held), heads_of(v_g[:, :, t], held)
        return s + key[..., None] * value[:, :, None], z + key

    def read(state: tuple, i: int) -> Tensor:
        s, z = (heads_of(part, heads) for part in state)
        query = phi(q_h[:, :, i], w_q, True)
        return quotient(torch.einsum("bhf,bhfe->bhe", query, s), (query * z).sum(-1, keepdim=True) + cfg.eps)

    s = heads_of(initial(call, q, len(q), held, 2 * w_k.shape[-1], v.shape[3] + 1), held)
    out, end = recurrence((s[..., :-1], s[..., -1]), write, read, n, m, call)
    return rounded(out, None if end is None else torch.cat([end[0], end[1][..., None]], -1), v)


def mapped(x: Tensor, w: Tensor) -> Tensor:
    x = at_least_float32(x)
    return x @ w.to(x.dtype)  # [B, H, N, F]


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    y_q, y_k = mapped(q, call.params["w_q"]), mapped(k, call.params["w_k"])
    if cfg.feature == "softmax":
        phi_q, phi_k = (torch.cat([y, -y], dim=-1).softmax(-1) for y in (y_q, y_k))
    else:
        y_k = y_k.clamp(-cfg.limit, cfg.limit)
        top = y_q.abs().amax(-1, keepdim=True).detach()
        phi_q, phi_k = (torch.cat([y - m, -y - m], dim=-1).exp() for y, m in ((y_q, top), (y_k, 0)))
    state, share = call.initial_state, q.shape[1] // different_heads(k, call)
    if state is not None:
        state = per_query_head(state, q.shape[1])

    def finish(out: Tensor, end: Tensor | None) -> tuple[Out, Tensor | None]:
        return out, None if end is None else end[:, ::share]

    return Form(phi_q, phi_k, v, normalise=True, eps=cfg.eps, state=state, finish=finish)


def different_heads(k: K, call: Call) -> int:
    """How many heads of the state differ: KV heads, or all where a mask or the state before tells them apart."""
    known = [k, *(t for t in (call.key_mask, call.initial_state) if t is not None)]
    return max(t.shape[1] for t in known)


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return dims["kv_heads"] * 2 * (cfg.width or dims["key"]) * (dims["value"] + 1)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    test_settings=({"feature": "exp", "width": 3},),
    state_size=state_size,
    transfer="weights",
    exempt={"neutral": "no setting turns it into softmax attention"},
    card=Card(
        title="Hedgehog",
        paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv:2402.04347",
        year=2024,
        idea="the feature map of linear attention is trained on softmax's own weights, so trained models convert",
        cost="O((N + M)·D·(F + E)) time, with F = D by default",
        state="2F·(E + 1) numbers per KV head, whatever the length",
        needs=("qkv", "learned maps"),
        lineage=("linear_attention", "softmax"),
        caveat=(
            "the map is applied to queries and keys as attention sees them, after rotary positions, so its weights "
            "depend on where in the text a pair stands, and places never trained on are weaker. Codes differ: "
            "flash-linear-attention has a factor 2 inside the softmax and a bias, LoLCATs a softmax for each half"
        ),
    ),
)
