"""Sparsifiner: a cheap low-rank guess of the attention map says which keys each query reads; there softmax is exact.

    q̃, k̃ = q W_q + b_q, k W_k + b_k              `width` of the channels, one map for all heads
    C     = softmax(q̃ (W_downᵀ k̃)ᵀ / √width)      [N, n_down] of every head: its r largest, those above a threshold
    S     = C W_backᵀ                             [N, N]: W_back as absolute values, entries up to `basis` are 0
    o_i   = Σ_j softmax_j(q_i·k_j / √D) v_j       over the B = ⌈keep·N⌉ keys with the largest S_ij

W_down and W_back [N, n_down] have a row for each place of the image, so the page is for `tokens` tokens and no other
number. The first `dense` tokens, the class token, read all keys; as a key the class token competes with the others.

The choice has no gradient. Its parameters learn by the squared distance of `guess`, which is S with the signs of W_back
and without thresholds, from the model's own dense attention; the model then learns with the choice, from a dense one.

Worked by hand: four tokens, one key each. The first coefficient compares a query with key 0 (1), the second with key 2
(-1), and the larger one alone counts: it points at key 1 for queries above zero, at key 3 for those below.

>>> import torch
>>> q, k = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([1.0, 0.0, -1.0, 0.0])
>>> q, k, v = (t.view(1, 1, 4, 1) for t in (q, k, torch.tensor([10.0, 20.0, 30.0, 40.0])))
>>> params = {"w_q": torch.ones(1, 1), "w_k": torch.ones(1, 1), "b_q": torch.zeros(1), "b_k": torch.zeros(1)}
>>> params["down"] = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
>>> params["back"] = torch.tensor([[0.1, 0.1], [0.5, 0.0], [0.1, 0.1], [0.0, -0.5]])
>>> cfg = Config(tokens=4, keep=0.25, n_down=2, coefficients=1, dense=0)
>>> reference(q, k, v, cfg, Call("self", params=params))[0].flatten().tolist()
[20.0, 40.0, 20.0, 40.0]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    exact,
    gather_rows,
    heads_of,
    per_query_head,
    row_blocks,
    softmax_attention,
)
from regard.ops.closed import highest


@dataclass(frozen=True)
class Config:
    tokens: int = 197  # N, the class token included
    keep: float = 0.25  # share of the keys that a query reads
    n_down: int | float = 1 / 6  # a number, or a share of the tokens
    width: float = 0.5  # of the guess, as a share of D
    basis: float = 0.02  # entries of |W_back| up to this are 0
    coefficients: int | None = 8  # r; None: all
    coefficient: float = 0.0  # those up to this are 0
    dense: int = 1  # first tokens that read all keys
    scale: float | None = None  # of the scores; None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.dense >= 0, "tokens >= 1 and dense >= 0", cfg=self)
        require(0 < self.keep <= 1 and 0 < self.width <= 1, "keep and width are shares in (0, 1]", cfg=self)
        share = isinstance(self.n_down, float)
        rule = "n_down is a number of 1 or more, or a share in (0, 1)"
        require(0 < self.n_down < 1 if share else self.n_down >= 1, rule, n_down=self.n_down)
        require(self.basis >= 0 and self.coefficient >= 0, "thresholds are 0 or more", cfg=self)
        require(self.coefficients is None or self.coefficients >= 1, "coefficients >= 1, or None", cfg=self)

    @property
    def rank(self) -> int:
        """n_down as a number."""
        return max(1, int(self.n_down * self.tokens)) if isinstance(self.n_down, float) else self.n_down

    @property
    def budget(self) -> int:
        """B, the keys that a query reads."""
        return math.ceil(self.keep * self.tokens)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    d, places = dims["key"], (cfg.tokens, cfg.rank)
    c = max(1, int(cfg.width * d))
    params = {"w_q": torch.randn(d, c) * d**-0.5, "w_k": torch.randn(d, c) * d**-0.5}
    params |= {"b_q": torch.zeros(c), "b_k": torch.zeros(c)}
    return params | {name: 0.02 * torch.randn(places) for name in ("down", "back")}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    p = {name: t.detach().double() for name, t in call.params.items()}
    small_q, small_k = (t.detach() @ p[f"w_{a}"] + p[f"b_{a}"] for a, t in (("q", q_h), ("k", k_h)))
    mixed = torch.einsum("bhmc,mr->bhrc", small_k, p["down"])
    c = (torch.einsum("bhnc,bhrc->bhnr", small_q, mixed) / small_q.shape[3] ** 0.5).softmax(-1)
    scale, out = q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale, torch.zeros_like(q_h[..., :1] * v_h)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = (
            [*range(cfg.tokens)] if i < cfg.dense else keys_of(c[b, h, i].tolist(), p["back"].tolist(), cfg)
        )
        out[b, h, i] = (k_h[b, h, keys] @ q_h[b, h, i] * scale).softmax(0) @ v_h[b, h, keys]
    return out.to(v.dtype), None


def keys_of(c: list[float], back: list[list[float]], cfg: Config) -> list[int]:
    """The keys that a query with these coefficients reads."""
    largest = sorted(range(len(c)), key=lambda r: (-c[r], r))[: cfg.coefficients]
    counted = [r for r in sorted(largest) if c[r] > cfg.coefficient]
    s = [math.fsum(c[r] * abs(row[r]) for r in counted if abs(row[r]) > cfg.basis) for row in back]
    return sorted(sorted(range(len(s)), key=lambda j: (-s[j], j))[: cfg.budget])


def coefficients(q: Tensor, k: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """C [B, H, N, n_down] before anything is cut off."""
    p = {name: at_least_float32(t) for name, t in params.items()}
    small_q, small_k = (at_least_float32(t) @ p[f"w_{a}"] + p[f"b_{a}"] for a, t in (("q", q), ("k", k)))
    mixed = per_query_head(p["down"].mT @ small_k, q.shape[1])  # [B, H, n_down, width]
    return (small_q @ mixed.mT * small_q.shape[3] ** -0.5).softmax(-1)


def guess(q: Tensor, k: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """[B, H, N, N], what learns to be the attention map."""
    return coefficients(q, k, params) @ at_least_float32(params["back"]).mT


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    scale = q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale
    first = q.shape[2] if cfg.budget == cfg.tokens else min(cfg.dense, q.shape[2])
    parts = [softmax_attention(q[:, :, :first], k, v, scale=scale)] if first else []
    params = {name: t.detach() for name, t in call.params.items()}
    c, back = (
        coefficients(q[:, :, first:].detach(), k.detach(), params),
        at_least_float32(params["back"]).abs(),
    )
    if cfg.coefficients is not None:
        largest = highest(c, cfg.coefficients)
        c = torch.zeros_like(c).scatter(-1, largest, c.gather(-1, largest))
    c, back = (F.threshold(t, low, 0.0) for t, low in ((c, cfg.coefficient), (back, cfg.basis)))
    for rows in row_blocks(c.shape[2], q.shape[0] * q.shape[1] * cfg.budget * (q.shape[3] + v.shape[3])):
        keys = highest(c[:, :, rows] @ back.mT, cfg.budget).flatten(2)  # [B, H, n·budget]
        k_r, v_r = (gather_rows(t, keys).view(len(t), -1, cfg.budget, t.shape[3]) for t in (k, v))
        asked = q[:, :, first:][:, :, rows]
        out = softmax_attention(asked.flatten(1, 2)[:, :, None], k_r, v_r, scale=scale)  # [B, H·n, 1, E]
        parts.append(out.view(*asked.shape[:3], v.shape[3]))
    return torch.cat(parts, dim=2), None


REFUSED = "the matrices between keys and their mixtures are learned for the places of an image"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    for_tokens=lambda cfg, n: replace(cfg, tokens=n),
    test_settings=(
        {"n_down": 3, "coefficients": 2, "dense": 0},
        {"keep": 0.5, "width": 0.25, "basis": 0.05, "coefficients": None, "coefficient": 0.1, "scale": 0.4},
        {"keep": 1.0},
    ),
    card=Card(
        title="Sparsifiner",
        paper=(
            "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, "
            "arXiv:2303.13755"
        ),
        year=2023,
        idea="a low-rank guess of each image's attention map picks the keys that every query reads",
        cost="O(N·B·(D + E)) time for B = keep·N keys, and O(N²·n_down) for the guess, whose products are small",
        state="none: it is not causal",
        needs=("qkv", "vit"),
        lineage=("softmax",),
        neutral={"keep": 1.0},
        caveat=(
            "defaults are those of the released runs (32 of 197, the 8 largest coefficients, W_back above 0.02); "
            "there the coefficients are scaled by one over the root of the number of heads, here of the guess's width, "
            "a factor that W_q learns. A plain threshold on S in the place of the largest B, which the released code "
            "has too, is not here, nor is its pruning of tokens. Equal scores, such as zeros, go to the lower index. "
            "S itself is computed in full, in blocks of rows; the paper counts on sparse products"
        ),
    ),
)
