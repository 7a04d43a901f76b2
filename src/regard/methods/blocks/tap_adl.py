"""A ViT layer made robust: tokens are pooled with their neighbours before attention, and rows of attention kept apart.

    TAP    y = Σ_k m_k ⊙ pool_k(x),   pool_0(x) = x,   pool_k(x) = mean of the nine at distance k (zero off the image)
           m = softmax over k of conv3x3(a ⊙ conv3x3(x) + b): for each token, of K branches
    layer  x' = x + Attention(LN(y)),   out = x' + W_2 gelu(W_1 LN(x') + b_1) + b_2
    ADL    A' = A where A > 2 / N, else 0, of A, the mean of the heads;   mean over rows i of cos(A'_i, (mean_i A_i)')

Without it a few tokens take most of the attention of all others, and what corrupts them corrupts the image. TAP lets
a token ask through its neighbourhood, of a size that is chosen for each; only attention sees the mixture. ADL is a
loss, which `adl` gives of the weights of all layers (`with_weights`): rows that all look at the same tokens cost 1,
rows that look at tokens of their own nothing. Comparing with the mean row costs N cosines where pairs cost N².

Worked by hand, two branches of equal weight on a 3 x 3 image of ones: the middle becomes (1 + 9/9) / 2, a corner, with
four of nine places in the image, (1 + 4/9) / 2. Of four tokens, two pairs that look at themselves: the mean row is
below 2 / 4 everywhere, and costs nothing; four equal rows cost 1.

>>> mixing = torch.zeros(1, 2, 3, 3)
>>> corner = slow_tap(torch.ones(1, 1, 3, 3), mixing)[0, 0, 1:, 1:]
>>> [round(y, 4) for y in corner.flatten().tolist()]
[1.0, 0.8333, 0.8333, 0.7222]
>>> own = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])[[0, 0, 1, 1]]
>>> round(adl([own[None, None]]).item(), 4), round(adl([own[None, None, [0, 0, 0, 0]]]).item(), 4)
(0.0, 1.0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, softmax_attention
from regard.ops.grid import any_grid, as_image, as_tokens
from regard.ops.precision import as_written


@dataclass(frozen=True)
class Config:
    branches: int = 4  # K: the token itself, and pools at distances 1 .. K - 1
    expand: int = 4  # width of the MLP's middle, in widths of the layer
    eps: float = 1e-6  # added to the variance in the norms

    def __post_init__(self) -> None:
        require(min(self.branches, self.expand) >= 1, "branches and expand are at least 1", cfg=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    c, heads, k, inner = dims["width"], dims["heads"], cfg.branches, cfg.expand * dims["width"]
    require(c % heads == 0, "the width is a multiple of the heads", width=c, heads=heads)

    def uniform(*shape: int, fan: int) -> Tensor:
        return torch.empty(*shape).uniform_(-1, 1) * fan**-0.5

    params = {
        "mix_in": uniform(k, c, 3, 3, fan=9 * c),
        "mix_scale": torch.ones(k),
        "mix_shift": torch.zeros(k),
        "mix_out": uniform(k, k, 3, 3, fan=9 * k),
        "qkv": uniform(3, heads, c // heads, c, fan=c),
        "out": uniform(c, c, fan=c),
        "up": uniform(inner, c, fan=c),
        "down": uniform(c, inner, fan=inner),
    }
    params |= {"ln_1": torch.ones(c), "ln_2": torch.ones(c)}
    biases = {"qkv_bias": (3, heads, c // heads), "up_bias": (inner,)}
    biases |= {f"{name}_bias": (c,) for name in ("out", "down", "ln_1", "ln_2")}
    return params | {name: torch.zeros(shape) for name, shape in biases.items()}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * p[name] + p[name + "_bias"]
        )

    image = x64.mT.unflatten(2, call.sides)
    scaled = slow_conv(image, p["mix_in"]) * p["mix_scale"][:, None, None] + p["mix_shift"][:, None, None]
    y = norm(slow_tap(image, slow_conv(scaled, p["mix_out"])).flatten(2).mT, "ln_1")
    q, k, v = torch.einsum("bnc,phdc->pbhnd", y, p["qkv"]) + p["qkv_bias"][:, None, :, None]
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k / k.shape[-1] ** 0.5).softmax(-1)
    mixed = torch.einsum("bhnm,bhmd->bnhd", weights, v).flatten(2)
    x64 = x64 + torch.einsum("bnc,dc->bnd", mixed, p["out"]) + p["out_bias"]
    middle = torch.einsum("bnc,dc->bnd", norm(x64, "ln_2"), p["up"]) + p["up_bias"]
    gelu = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    return (x64 + torch.einsum("bnc,dc->bnd", gelu, p["down"]) + p["down_bias"]).to(x.dtype), None


def moved(image: Tensor, dy: int, dx: int) -> Tensor:
    """At each place of [..., rows, columns] what stands dy below and dx to the right; zero off the image."""
    (rows, columns), out = image.shape[-2:], torch.zeros_like(image)
    here = [slice(max(-d, 0), max(n - max(d, 0), 0)) for d, n in ((dy, rows), (dx, columns))]
    there = [slice(max(d, 0), max(n - max(-d, 0), 0)) for d, n in ((dy, rows), (dx, columns))]
    out[..., here[0], here[1]] = image[..., there[0], there[1]]
    return out


def slow_conv(image: Tensor, weight: Tensor) -> Tensor:
    """[B, K, rows, columns] of [B, C, rows, columns] and weights [K, C, 3, 3]."""
    out = torch.zeros_like(image[:, :1])
    for i in range(3):
        for j in range(3):
            out = out + torch.einsum("bcij,kc->bkij", moved(image, i - 1, j - 1), weight[:, :, i, j])
    return out


def slow_tap(image: Tensor, mixing: Tensor) -> Tensor:
    """The mixture of the pools of [B, C, rows, columns], by the logits [B, K, rows, columns]."""
    m = mixing.softmax(1)
    out = m[:, :1] * image
    for k in range(1, m.shape[1]):
        for dy in (-k, 0, k):
            for dx in (-k, 0, k):
                out = out + m[:, k : k + 1] * moved(image, dy, dx) / 9
    return out


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, scale=q.shape[-1] ** -0.5)

    return run(x, cfg, call, attend), None


@as_written
def with_weights(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """(out, attention weights [B, H, N, N]) of the layer, gradients through both: what `adl` is asked of."""
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((at_least_float32(q) @ at_least_float32(k).mT * q.shape[-1] ** -0.5).softmax(-1))
        return kept[0].to(v.dtype) @ v

    return run(x, cfg, call, attend), kept[0]


def run(x: Tensor, cfg: Config, call: Call, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    dtype, (x,) = x.dtype, for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    y = layer_norm(tap(x, p, call.sides), p, "ln_1", cfg)
    q, k, v = torch.einsum("bnc,phdc->pbhnd", y, p["qkv"]) + p["qkv_bias"][:, None, :, None]
    x = x + F.linear(attend(q, k, v).transpose(1, 2).flatten(2), p["out"], p["out_bias"])
    middle = F.gelu(F.linear(layer_norm(x, p, "ln_2", cfg), p["up"], p["up_bias"]))
    return (x + F.linear(middle, p["down"], p["down_bias"])).to(dtype)


def tap(x: Tensor, p: dict[str, Tensor], sides: Sides) -> Tensor:
    """What attention sees in the place of x [B, N, C]."""
    image = as_image(x, sides)
    middle = (
        F.conv2d(image, p["mix_in"], padding=1) * p["mix_scale"][:, None, None]
        + p["mix_shift"][:, None, None]
    )
    m = at_least_float32(F.conv2d(middle, p["mix_out"], padding=1)).softmax(1)  # [B, K, rows, columns]
    image = at_least_float32(image)
    mixed = m[:, :1] * image
    for k in range(1, m.shape[1]):
        mixed = mixed + m[:, k : k + 1] * pool(image, k)
    return as_tokens(mixed)


def pool(image: Tensor, d: int) -> Tensor:
    """Mean of the nine places at distance d, the rows' sums first; places off the image are zero."""
    wide = F.pad(image, (d, d, d, d))
    wide = wide[:, :, : -2 * d] + wide[:, :, d:-d] + wide[:, :, 2 * d :]
    return (wide[..., : -2 * d] + wide[..., d:-d] + wide[..., 2 * d :]) / 9


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str, cfg: Config) -> Tensor:
    full = at_least_float32(x)
    weight, bias = p[name].to(full.dtype), p[name + "_bias"].to(full.dtype)
    return F.layer_norm(full, full.shape[-1:], weight, bias, cfg.eps).to(p[name].dtype)


def adl(layers: Sequence[Tensor], above: float = 2.0) -> Tensor:
    """The loss of attention that looks at few tokens: mean over layers of weights [B, H, N, N], between 0 and 1.

    Weights of `above` / N and less count as none; a row that has no others costs nothing.
    """
    return torch.stack([likeness(weights.mean(1), above) for weights in layers]).mean()


def likeness(rows: Tensor, above: float) -> Tensor:
    """Mean cosine of the rows of [B, N, N] with their mean row, where both are large."""
    mean = rows.mean(1, keepdim=True)
    bar = above / rows.shape[-1]
    rows, mean = (torch.where(t > bar, t, 0.0) for t in (rows, mean))
    # a square root has no slope at zero
    norms = [t.square().sum(-1).clamp(min=1e-16).sqrt() for t in (rows, mean)]
    return ((rows * mean).sum(-1) / (norms[0] * norms[1])).mean()


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid),
    test_settings=({"branches": 2, "expand": 1},),
    card=Card(
        title="TAP and ADL: token-aware average pooling, attention diversification loss",
        paper="Robustifying Token Attention for Vision Transformers (2023)",
        year=2023,
        idea="tokens ask through pools of their neighbours, of a chosen size; a loss keeps rows of attention apart",
        cost="O(N²·C + N·C²) time, the pools O(N·K·C); with the loss N² weights a head are stored",
        state="none",
        needs=("vit",),
        lineage=("softmax",),
        caveat=(
            "the batch norm between the two convolutions stands as what it is at inference, a scale and a shift of "
            "each branch: statistics of a batch would let its images see each other. The loss counts weights up to "
            "2 / N as none, so that uniform attention costs nothing. Pools count places off the image as zeros, as "
            "released; grids need not be square here. There the layers are those of FAN or RVT, here a plain ViT's"
        ),
    ),
)
