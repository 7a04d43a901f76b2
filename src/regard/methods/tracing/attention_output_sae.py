"""Attention-output SAE: a sparse dictionary of what a layer's heads write, each feature split by head and source token.

    z = z_1 ⊕ ... ⊕ z_H                     the outputs of all heads of a layer, one after the other, before W_O
    f = ReLU(W_enc (z - b_dec) + b_enc)     features, few of them above zero
    ẑ = W_dec f + b_dec                     W_dec's column of a feature is its direction, of length 1
    loss = mean over tokens of ‖ẑ - z‖² + λ ‖f‖₁

A feature's pre-activation p is linear in z, and z is linear in the values once the attention α is held fixed:

    p_i = Σ_h W_enc[:, h] z_{i,h} - W_enc b_dec + b_enc               exactly, by head
    W_enc[:, h] z_{i,h} = Σ_j α_h(i, j) · W_enc[:, h] v_{g(h),j}      exactly, by source token; g(h) the KV head of h

so that it is known which head, and which earlier token, made a feature fire; the two bias terms belong to no token. The
share ‖W_dec[h]‖ / Σ_h' ‖W_dec[h']‖ says to which heads a feature belongs by its weights alone. Of the heads of GPT-2
small at least 90 % take part in several unrelated tasks, by the ten features with the largest share of each.

Two heads of width 1 share one value head; token 1 gives α = (1/4, 3/4) and (1/2, 1/2) to values 4 and 8:

>>> import torch
>>> sae = Dictionary(*(torch.tensor(x) for x in ([[2.0, 1.0]], [0.5], [[0.6, 0.8]], [1.0, 0.5])))
>>> weights = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])
>>> parts = measure(sae, torch.tensor([[[[7.0]], [[6.0]]]]), weights, torch.tensor([[[[4.0], [8.0]]]]))
>>> parts["by_source"].squeeze().tolist()  # 2 · (1/4) 4, 2 · (3/4) 8; 1 · (1/2) 4, 1 · (1/2) 8
[[2.0, 12.0], [2.0, 4.0]]
>>> parts["by_head"].flatten().tolist(), parts["b_dec"].item(), parts["b_enc"].item()  # -(2 · 1 + 1 · 1/2)
([14.0, 6.0], -2.5, 0.5)
>>> parts["features"].item()  # 14 + 6 - 2.5 + 0.5
18.0
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core import Card, Observer, Site, require
from regard.kinds.tracing import TracingPage


@dataclass(frozen=True)
class Config:
    l1: float = 0.5  # λ
    expansion: int = 32  # features for each dimension of z
    rate: float = 1.2e-3  # Adam's learning rate
    betas: tuple[float, float] = (0.0, 0.9999)  # of Adam
    batch: int = 4096  # tokens a step

    def __post_init__(self) -> None:
        require(self.l1 >= 0, "l1 >= 0", l1=self.l1)
        require(self.expansion >= 1, "expansion >= 1", expansion=self.expansion)
        require(self.rate > 0, "rate > 0", rate=self.rate)
        require(all(0 <= beta < 1 for beta in self.betas), "betas in [0, 1)", betas=self.betas)
        require(self.batch >= 1, "batch >= 1", batch=self.batch)


class Dictionary(NamedTuple):
    """What an SAE has learned. The D = H·E dimensions are those of the heads, one head after the other."""

    w_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    w_dec: Tensor  # [F, D] the direction of each feature
    b_dec: Tensor  # [D]


def pre_activations(sae: Dictionary, z: Tensor) -> Tensor:
    """[..., F] of z [..., D]."""
    return (z - sae.b_dec) @ sae.w_enc.mT + sae.b_enc


def encode(sae: Dictionary, z: Tensor) -> Tensor:
    """[..., F] features of z [..., D]."""
    return pre_activations(sae, z).relu()


def decode(sae: Dictionary, features: Tensor) -> Tensor:
    """[..., D] of features [..., F]."""
    return features @ sae.w_dec + sae.b_dec


def loss(sae: Dictionary, z: Tensor, features: Tensor, l1: float) -> Tensor:
    """Of z [tokens, D] and its features [tokens, F]: both terms summed over their dimensions, the mean over tokens."""
    return (decode(sae, features) - z).square().sum(-1).mean() + l1 * features.abs().sum(-1).mean()


def head_shares(w_dec: Tensor, heads: int) -> Tensor:
    """[F, H] share of each head in the lengths of a feature's direction w_dec [F, D]; rows sum to 1."""
    norms = w_dec.unflatten(-1, (heads, -1)).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)


def check(sae: Dictionary, z: Tensor, weights: Tensor, values: Tensor) -> None:
    """Raise ValueError for shapes that do not belong together."""
    heads, width, shared = z.shape[1], z.shape[3], values.shape[1]
    require(sae.w_enc.shape[1] == heads * width, "w_enc [F, H·E]", w_enc=sae.w_enc, z=z)
    require(heads % shared == 0, "query heads are a multiple of KV heads", heads=heads, kv=shared)
    same = weights.shape == (*z.shape[:3], values.shape[2]) and values.shape[3] == width
    require(
        same, "z [B, H, N, E], weights [B, H, N, M], values [B, G, M, E]", z=z, weights=weights, values=values
    )


def measure(
    sae: Dictionary, z: Tensor, weights: Tensor, values: Tensor, only: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Which heads and source tokens make the features of a layer; all but the first three for the features `only`.

    z [B, H, N, E] head outputs, weights [B, H, N, M], values [B, G, M, E] of its G KV heads. Gives features [B, N, F],
    reconstruction [B, H, N, E], error [B, N]; by_head [B, N, K, H], by_source [B, N, K, H, M], b_dec [K], b_enc [K]:
    a pre-activation is the sum of by_head and of both b's, and by_head is that of by_source; shares [K, H].
    """
    check(sae, z, weights, values)
    heads, chosen = z.shape[1], slice(None) if only is None else list(only)
    flat = z.transpose(1, 2).flatten(2)  # [B, N, D]
    features = encode(sae, flat)
    back = decode(sae, features)
    by_slice = sae.w_enc[chosen].unflatten(1, (heads, -1))  # [K, H, E]
    written = torch.einsum("bhme,khe->bhmk", values.repeat_interleave(heads // values.shape[1], 1), by_slice)
    return {
        "features": features,
        "reconstruction": back.unflatten(2, (heads, -1)).transpose(1, 2),
        "error": (back - flat).square().sum(-1),
        "by_head": torch.einsum("bhne,khe->bnkh", z, by_slice),
        "by_source": torch.einsum("bhnm,bhmk->bnkhm", weights, written),
        "b_dec": -(sae.w_enc[chosen] @ sae.b_dec),
        "b_enc": sae.b_enc[chosen],
        "shares": head_shares(sae.w_dec[chosen], heads),
    }


def reference(
    sae: Dictionary, z: Tensor, weights: Tensor, values: Tensor, only: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The same by the definition: token by token, feature by feature, head by head, source by source."""
    w_enc, b_enc, w_dec, b_dec, z, weights, values = (x.double() for x in (*sae, z, weights, values))
    (batch, heads, rows, width), keys = z.shape, weights.shape[3]
    kept = list(range(len(w_enc)) if only is None else only)
    at = torch.arange(heads * width).view(heads, width)
    features, error, back = (
        z.new_zeros(batch, rows, len(w_enc)),
        z.new_zeros(batch, rows),
        torch.zeros_like(z),
    )
    by_head = z.new_zeros(batch, rows, len(kept), heads)
    by_source, shares = z.new_zeros(*by_head.shape, keys), z.new_zeros(len(kept), heads)
    for b, i in product(range(batch), range(rows)):
        x, y = torch.cat([z[b, h, i] for h in range(heads)]), b_dec.clone()
        for k in range(len(w_enc)):
            features[b, i, k] = max(0.0, float(w_enc[k] @ (x - b_dec) + b_enc[k]))
            y += features[b, i, k] * w_dec[k]
        error[b, i] = (y - x) @ (y - x)
        for h in range(heads):
            back[b, h, i] = y[at[h]]
            for n, k in enumerate(kept):
                by_head[b, i, n, h] = w_enc[k, at[h]] @ z[b, h, i]
                for j in range(keys):
                    v = values[b, h * values.shape[1] // heads, j]
                    by_source[b, i, n, h, j] = weights[b, h, i, j] * (w_enc[k, at[h]] @ v)
    for n, k in enumerate(kept):
        norms = [float(w_dec[k, at[h]] @ w_dec[k, at[h]]) ** 0.5 for h in range(heads)]
        for h in range(heads):
            shares[n, h] = norms[h] / sum(norms) if any(norms) else 0.0
    biases = {"b_dec": -(w_enc[kept] @ b_dec), "b_enc": b_enc[kept]}
    whole = {"features": features, "reconstruction": back, "error": error}
    return {**whole, "by_head": by_head, "by_source": by_source, "shares": shares, **biases}


def cases(seed: int) -> Iterable[tuple]:
    """One head and groups of heads, one token, more keys than queries, a feature without a direction."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((1, 1, 1, 1, 1, 2, 3), (2, 4, 2, 3, 3, 3, 5), (1, 6, 3, 2, 5, 2, 4), (1, 3, 1, 4, 4, 1, 2))
    for n, (batch, heads, shared, rows, keys, width, count) in enumerate(sizes):
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        dim = heads * width
        sae = Dictionary(draw(count, dim), draw(count), draw(count, dim), draw(dim))
        if n == 3:
            sae.w_dec[0] = 0
        hidden = torch.ones(rows, keys).triu(keys - rows + 1).bool()
        scores = draw(batch, heads, rows, keys).masked_fill(hidden, -torch.inf)
        weights, values = scores.softmax(-1), draw(batch, shared, keys, width)
        z = weights @ values.repeat_interleave(heads // shared, 1)
        yield sae, z, weights, values, None if n % 2 else [count - 1, 0]


def observer() -> Observer:
    """Head outputs [B, H, N, E], layer by layer."""
    return Observer("z", Site("z", tower="text"), name="attention_output_sae")


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    observer=observer,
    patterns=("causal_self",),
    card=Card(
        title="Attention-output SAE",
        paper="Interpreting Attention Layer Outputs with Sparse Autoencoders",
        year=2024,
        idea="a sparse dictionary of what a layer's heads write; features split exactly by head and source token",
        cost="N·F·H·E a layer; by source N·M·H for each feature",
        needs=("decoder-lm", "z"),
        lineage=("sparse autoencoders", "direct feature attribution"),
        caveat="the released trainer sums squared errors over the dimensions of z, as here, so that λ goes with the "
        "size of z; it holds the rows of W_dec at length 1 and takes that part out of their gradient "
        "(regard.explaining.sae does both). Gemma-2B's weights come from another loss, with λ on ‖W_dec column‖ · f, "
        "and released SAEs may rescale z. The released split by source leaves both bias terms out and has no grouped "
        "KV heads. Attention is held fixed: what moved α is not in the split",
    ),
)
