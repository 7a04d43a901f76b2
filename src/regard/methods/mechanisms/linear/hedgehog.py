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
>>> round(reference(q, k, v, Config(), params=params, pattern="cross")[0].item(), 3)
34.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Mechanism, Out, Q, V, require
from regard.core.shapes import PATTERNS
from regard.ops import at_least_float32, dense_linear, key_mask, linear, per_query_head

FEATURES = ("softmax", "exp")


@dataclass(frozen=True)
class Config:
    feature: str = "softmax"  # over the features, as the paper computes it; "exp": without their sum
    width: int | None = None  # F; None: as wide as the keys
    limit: float = 20.0  # with "exp", |xW| of a key counts as at most this, so that sums stay finite
    eps: float = 1e-12
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.feature in FEATURES, f"feature is one of {FEATURES}", feature=self.feature)
        require(self.width is None or self.width >= 1, "width >= 1", width=self.width)
        require(0 < self.limit <= 40, "0 < limit <= 40", limit=self.limit)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    eye = torch.eye(dims["key"], cfg.width or dims["key"])
    return {f"w_{n}": eye.repeat(dims[h], 1, 1) for n, h in (("q", "heads"), ("k", "kv_heads"))}


def reference(
    q: Q, k: K, v: V, cfg: Config, *, params=None, state=None, x=None, **told
) -> tuple[Out, Tensor | None]:
    require(params, "hedgehog's maps: params from init(cfg, dims)", params=params)

    def features(t: Tensor, w: Tensor, of_query: bool) -> Tensor:
        y = torch.einsum(
            "bhnd,hde->bhne", at_least_float32(t), at_least_float32(w).to(at_least_float32(t).dtype)
        )
        y = torch.cat([y, -y], dim=-1)  # [B, H, N, 2F]
        if cfg.feature == "exp":  # a factor that all features of a query share cancels
            y = y - y.amax(-1, keepdim=True).detach() if of_query else y.clamp(-cfg.limit, cfg.limit)
            return y.exp()
        e = (y - y.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    told = dict(told, state=None if state is None else per_query_head(state, q.shape[1]))
    phi_q, phi_k = features(q, params["w_q"], True), features(k, params["w_k"], False)
    out, end = dense_linear(phi_q, phi_k, v, normalise=True, eps=cfg.eps, **told)
    return out, None if end is None else end[:, :: share(q, k, told)]


def share(q: Tensor, k: Tensor, told: dict) -> int:
    """Query heads that hold one state: those of a KV head, unless the mask hides different keys from each."""
    there = key_mask(told.get("mask"), q, k, told.get("roles"))
    return q.shape[1] // k.shape[1] if there is None or there.shape[1] == 1 else 1


def mapped(x: Tensor, w: Tensor) -> Tensor:
    x = at_least_float32(x)
    return x @ w.to(x.dtype)  # [B, H, N, F]


def fast(
    q: Q, k: K, v: V, cfg: Config, *, params=None, state=None, x=None, **told
) -> tuple[Out, Tensor | None]:
    require(params, "hedgehog's maps: params from init(cfg, dims)", params=params)
    y_q, y_k = mapped(q, params["w_q"]), mapped(k, params["w_k"])
    if cfg.feature == "softmax":
        phi_q, phi_k = (torch.cat([y, -y], dim=-1).softmax(-1) for y in (y_q, y_k))
    else:
        y_k = y_k.clamp(-cfg.limit, cfg.limit)
        top = y_q.abs().amax(-1, keepdim=True).detach()
        phi_q, phi_k = (torch.cat([y - m, -y - m], dim=-1).exp() for y, m in ((y_q, top), (y_k, 0)))
    state = None if state is None else per_query_head(state, q.shape[1])
    told = dict(told, normalise=True, eps=cfg.eps, chunk=cfg.chunk)
    out, end = linear(phi_q, phi_k, v, state=state, **told)
    return out, None if end is None else end[:, :: share(q, k, told)]


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return dims["kv_heads"] * 2 * (cfg.width or dims["key"]) * (dims["value"] + 1)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    speed=("chunk",),
    tries=({"feature": "exp", "width": 3},),
    state_size=state_size,
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
