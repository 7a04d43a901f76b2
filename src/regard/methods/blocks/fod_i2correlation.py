"""I2Correlation of FOD: what a place sees in its own image, less what it sees in the mean of normal images.

    intra    I = softmax(q k' / √d) v,     q, k, v of x                 among the tokens of the image
    inter    X = softmax(q k' / √d) v,     q of x, k and v of R         R [N, C], a normal feature for each place
    block    z = LN((x + I) - (x + X)),    out = LN(z + W_2 gelu(W_1 z + b_1) + b_2)
    target   T_ij ∝ exp(-(y_i - y_j)² / 2σ_y² - (x_i - x_j)² / 2σ_x²),   rows sum to 1
             σ = 3^(sigmoid(5 s) + 1e-5) - 1,   s a linear map of token i: two numbers a head, both below 2
    D_i      mean over heads of KL(A_i | T_i) + KL(T_i | A_i),    A the weights of a branch;   H_i  their entropy
    learned  intra: T towards A; A away from T, H up.   inter: T away from A; A towards T, H down
    score    e_i · (max_j S_j - S_i),   S = softmax over places of -D of inter,   e the error of a reconstruction

A patch may be rebuilt well although it is strange. Here it is also asked whether it looks where normal patches look:
among normal features a normal patch finds its own place, as the target is taught to say, and a strange one does not.
In the image itself weights are kept wide, so that the other branch has something to be less than.

`correlations` gives the output with both maps, `discrepancy` is D, `learning` the loss, `anomaly` the score.

Worked by hand: with queries of zero I is the mean (4, 1) of the tokens, X that of R, (1, 1): their difference (3, 0)
is normed to (1, -1), whatever token asks.

>>> cfg = Config(tokens=2, expand=1)
>>> p = {name: torch.zeros_like(t) for name, t in init(cfg, {"width": 2, "heads": 1}).items()}
>>> p |= {"ln_1": torch.ones(2), "ln_2": torch.ones(2), "normal": torch.ones(2, 2)}
>>> p["intra_qkv"][2, 0], p["inter_qkv"][2, 0] = torch.eye(2), torch.eye(2)
>>> call = Call("self", params=p, grid=(1, 2))
>>> x = torch.tensor([[[3.0, 1.0], [5.0, 1.0]]])
>>> [round(y, 4) for y in reference(x, cfg, call)[0][0, 0].tolist()]
[1.0, -1.0]

σ = √3 - 1 where s = 0, and a place one step away weighs exp(-1 / 2σ²) = 0.393: T is 1 and 0.393 over 1.393, and
from weights of a half it is 2 · 0.218 · ln(1 / 0.393) / 2 away.

>>> weights, target = correlations(x, cfg, call)[1]["intra"]
>>> [round(t, 3) for t in target[0, 0, 0].tolist()], round(discrepancy(weights, target)[0, 0].item(), 3)
([0.718, 0.282], 0.203)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, softmax_attention
from regard.ops.grid import any_grid
from regard.ops.precision import as_written

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # of each branch its weights and its target, [B, H, N, N]
BRANCHES = {"both": ("intra", "inter"), "intra": ("intra",), "inter": ("inter",)}
FLOOR = 1e-4  # below logarithms


@dataclass(frozen=True)
class Config:
    tokens: int = 256  # places of the image, each with a normal feature
    branches: Literal["both", "intra", "inter"] = "both"  # one alone is added to x, as attention is elsewhere
    expand: int = 4  # width of the MLP's middle, in widths of the layer
    eps: float = 1e-5  # of the norms

    def __post_init__(self) -> None:
        require(min(self.tokens, self.expand) >= 1, "tokens and expand are at least 1", cfg=self)
        require(self.branches in BRANCHES, f"branches is one of {(*BRANCHES,)}", branches=self.branches)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """`normal` is R, for the mean of normal images to be put in; `sigma` moves the targets and no output."""
    c, heads, inner = dims["width"], dims["heads"], cfg.expand * dims["width"]
    require(c % heads == 0, "the width is a multiple of the heads", width=c, heads=heads)
    shapes: dict[str, tuple[int, ...]] = {"up": (inner, c), "down": (c, inner)}
    for name in BRANCHES[cfg.branches]:
        shapes |= {f"{name}_qkv": (3, heads, c // heads, c), f"{name}_sigma": (heads, 2, c)}
    params = {name: torch.empty(shape).uniform_(-1, 1) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    params |= {f"{name}_bias": torch.zeros(shape[:-1]) for name, shape in shapes.items()}
    if "inter" in BRANCHES[cfg.branches]:
        params["normal"] = torch.randn(cfg.tokens, c)
    norms = {name: torch.ones(c) for name in ("ln_1", "ln_2")}
    return params | norms | {f"{name}_bias": torch.zeros(c) for name in norms}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + cfg.eps).sqrt()
        return normed * p[name] + p[name + "_bias"]

    seen = {}
    for name in BRANCHES[cfg.branches]:
        of = x64 if name == "intra" else p["normal"].expand(len(x), -1, -1)
        seen[name] = x64 + slow_attention(x64, of, p[f"{name}_qkv"], p[f"{name}_qkv_bias"])
    z = norm(seen["intra"] - seen["inter"] if cfg.branches == "both" else seen[cfg.branches], "ln_1")
    middle = torch.einsum("bnc,dc->bnd", z, p["up"]) + p["up_bias"]
    gelu = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    out = norm(z + torch.einsum("bnc,dc->bnd", gelu, p["down"]) + p["down_bias"], "ln_2")
    return out.to(x.dtype), None


def slow_attention(x: Tensor, of: Tensor, qkv: Tensor, bias: Tensor) -> Tensor:
    """What tokens [B, N, C] take from others [B, N, C], a head at a time."""
    heads = []
    for (w_q, w_k, w_v), (b_q, b_k, b_v) in zip(qkv.unbind(1), bias.unbind(1), strict=True):
        q = torch.einsum("bnc,dc->bnd", x, w_q) + b_q
        k, v = torch.einsum("bnc,dc->bnd", of, w_k) + b_k, torch.einsum("bnc,dc->bnd", of, w_v) + b_v
        weights = (torch.einsum("bnd,bmd->bnm", q, k) / q.shape[2] ** 0.5).softmax(-1)
        heads.append(torch.einsum("bnm,bmd->bnd", weights, v))
    return torch.cat(heads, dim=2)


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    dtype, (x,) = x.dtype, for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    asked = {}
    for name in BRANCHES[cfg.branches]:
        q, k, v = project(x, p, name)
        asked[name] = softmax_attention(q, k.expand_as(q), v.expand_as(q), scale=q.shape[-1] ** -0.5)
    return fused(x, asked, p, cfg).to(dtype), None


@as_written
def correlations(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Pairs]:
    """(out, the weights and targets of each branch) of the layer, gradients through all."""
    dtype, x = x.dtype, at_least_float32(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    asked, pairs = {}, {}
    for name in BRANCHES[cfg.branches]:
        q, k, v = project(x, p, name)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        asked[name], pairs[name] = weights @ v, (weights, gaussian(spreads(x, p, name), call.sides))
    return fused(x, asked, p, cfg).to(dtype), pairs


def project(x: Tensor, p: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D] and k, v of the tokens or, [1, H, N, D], of the normal features."""
    weight, bias = p[f"{name}_qkv"], p[f"{name}_qkv_bias"][..., None, :]
    of = x if name == "intra" else p["normal"][None]
    k, v = torch.einsum("bnc,phdc->pbhnd", of, weight[1:]) + bias[1:, None]
    return torch.einsum("bnc,hdc->bhnd", x, weight[0]) + bias[0], k, v


def fused(x: Tensor, asked: Mapping[str, Tensor], p: Mapping[str, Tensor], cfg: Config) -> Tensor:
    """The layer after its attention, [B, H, N, D] of each branch; of two, x itself falls out."""
    parts = [t.transpose(1, 2).flatten(2) for t in asked.values()]
    z = layer_norm(parts[0] - parts[1] if len(parts) == 2 else x + parts[0], p, "ln_1", cfg)
    middle = F.gelu(F.linear(z, p["up"], p["up_bias"]))
    return layer_norm(z + F.linear(middle, p["down"], p["down_bias"]), p, "ln_2", cfg)


def layer_norm(x: Tensor, p: Mapping[str, Tensor], name: str, cfg: Config) -> Tensor:
    full = at_least_float32(x)
    weight, bias = p[name].to(full.dtype), p[name + "_bias"].to(full.dtype)
    return F.layer_norm(full, full.shape[-1:], weight, bias, cfg.eps).to(x.dtype)


def spreads(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    """σ_y and σ_x [B, H, N, 2] of each token."""
    s = torch.einsum("bnc,hac->bhna", x, p[f"{name}_sigma"]) + p[f"{name}_sigma_bias"][:, None]
    return torch.expm1(((5 * s).sigmoid() + 1e-5) * torch.log(s.new_tensor(3.0)))


def gaussian(sigma: Tensor, sides: Sides) -> Tensor:
    """T [B, H, N, N] of σ [B, H, N, 2]: over a whole grid it is one of rows times one of columns."""
    rows, columns = (torch.arange(n, device=sigma.device, dtype=sigma.dtype) for n in sides)
    places = torch.cartesian_prod(rows, columns)
    down, along = (
        (-(at - places[:, i, None]).square() / (2 * sigma[..., i, None].square())).softmax(-1)
        for i, at in enumerate((rows, columns))
    )
    return (down[..., None] * along[..., None, :]).flatten(-2)


def discrepancy(weights: Tensor, target: Tensor) -> Tensor:
    """D [B, N] of two [B, H, N, N]."""
    return ((weights - target) * ((weights + FLOOR).log() - (target + FLOOR).log())).sum(-1).mean(1)


def entropy(weights: Tensor) -> Tensor:
    """H [B, N] of [B, H, N, N]."""
    return -(weights * (weights + FLOOR).log()).sum(-1).mean(1)


def learning(layers: Sequence[Pairs], weight: float = 0.5, constraint: float = 0.5) -> Tensor:
    """Both phases in one, to stand beside twice the error of reconstruction: its gradients count, not its value."""
    terms = []
    for pairs in layers:
        for name, (weights, target) in pairs.items():
            sign = 1 if name == "intra" else -1
            apart = discrepancy(weights.detach(), target) - discrepancy(weights, target.detach())
            terms.append(sign * (weight * apart - constraint * entropy(weights)).mean())
    return torch.stack(terms).sum() / len(layers)


def anomaly(error: Tensor, layers: Sequence[Pairs]) -> Tensor:
    """The score [B, N] of an error [B, N]: by the inter branch, or by intra where there is no other."""
    name = "inter" if "inter" in layers[0] else "intra"
    alike = (-torch.stack([discrepancy(*pairs[name]) for pairs in layers]).mean(0)).softmax(-1)
    return error * (alike.amax(-1, keepdim=True) - alike if name == "inter" else alike)


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid),
    for_tokens=lambda cfg, n: replace(cfg, tokens=n),
    exempt={"residual": "x falls out of the difference of the branches, and what a norm gives is the output"},
    test_settings=({"expand": 1}, {"branches": "intra", "expand": 2}, {"branches": "inter", "eps": 1e-3}),
    card=Card(
        title="FOD: intra- and inter-correlations of an image with normal ones",
        paper=(
            "Focus the Discrepancy: Intra- and Inter-Correlation Learning for Image Anomaly Detection, "
            "arXiv:2308.02983"
        ),
        year=2023,
        idea="attention among tokens less that to mean normal features; maps that miss their Gaussians tell anomalies",
        cost="O(N²·C + N·C²) time; with targets and discrepancies N² weights a head and branch are stored",
        state="none",
        needs=("cnn-features", "vit"),
        lineage=("softmax",),
        caveat=(
            "the paper was not read in full: equations are those of its code. There targets are Gaussians of places "
            "alone, with σ of each token, head and axis, and of features only through σ. An output projection of the "
            "branches is computed there and thrown away: there is none here. The maximum of the score is taken in each "
            "image, there over a batch, which is one image. Normal features are given as the layer reads them: the "
            "mean of features of normal images, embedded, with positions. Both phases end in one step there too"
        ),
    ),
)
