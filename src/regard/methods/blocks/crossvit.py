"""CrossViT's fusion: the class token of each of two branches asks the patches of the other branch, and it alone.

    c    = W_in gelu(LN(CLS_a))                         into the other branch
    c'   = c + W_o softmax(q kᵀ / √D) v                 q of LN(c) alone; k, v of LN([c, patches_b])
    CLS_a ← W_back gelu(LN(c'))                         in the place of CLS_a, not added to it

and the same for CLS_b and patches_a. x holds both branches, [CLS_a, patches_a.., CLS_b, patches_b..]. One query for
each branch, so a head computes as many scores as the other branch has patches, and one: time is linear in the tokens.
Patches pass through untouched, and no class token reads the other one, so neither exchange has to come first.

The layers of each branch that come before it, with attention and MLP, are those of any ViT, and not on this page.

Worked by hand: two channels, of which LN leaves the signs, 1 and -1; gelu(1) = 0.8413, gelu(-1) = -0.1587. Matrices are
the identity, W_o three times it, queries zero. CLS_a is (+, -) and meets itself and two patches (-, +): their mean,
thrice, is (-1, 1), added to (0.8413, -0.1587), so that it comes back with the other signs. CLS_b, (-, +), meets itself
and one patch (+, -): the mean is 0, and it keeps its signs.

>>> import torch
>>> params = {name: torch.zeros_like(p) for name, p in init(Config(), {"width": 2, "heads": 1}).items()}
>>> params["norm"] = torch.ones(2, 3, 2)
>>> params["into"] = params["back"] = torch.eye(2).expand(2, 2, 2)
>>> params["out"], params["qkv"][:, 2] = 3 * torch.eye(2).expand(2, 1, 2, 2), torch.eye(2)
>>> x = torch.tensor([[[3.0, 1.0], [4.0, 0.0], [1.0, 3.0], [0.0, 4.0], [0.0, 4.0]]])
>>> call = Call("self", params=params)
>>> out = reference(x, Config(patches=(1, 2), eps=1e-9), call)[0]
>>> [round(number, 4) for number in out[0, [0, 2]].flatten().tolist()]
[-0.1587, 0.8413, -0.1587, 0.8413]
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, masked_softmax, mix, scores


@dataclass(frozen=True)
class Config:
    patches: tuple[int, int] = (
        400,
        196,
    )  # of branch a, 12 x 12 of 240 pixels, and of branch b, 16 x 16 of 224
    eps: float = 1e-6  # of the norms

    def __post_init__(self) -> None:
        rule = "two numbers of patches, 0 or more"
        require(len(self.patches) == 2 and min(self.patches) >= 0, rule, patches=self.patches)


def for_tokens(cfg: Config, n: int) -> Config:
    """The settings as they are where they are for n tokens, else those of two branches of about equal length."""
    require(n >= 2, "two class tokens, and the patches of two branches", tokens=n)
    return cfg if 2 + sum(cfg.patches) == n else replace(cfg, patches=((n - 1) // 2, (n - 2) // 2))


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """Stacked by branch: first what CLS_a passes, then CLS_b."""
    c, heads = dims["width"], dims["heads"]
    require(c % heads == 0, "the width is a multiple of the heads", width=c, heads=heads)
    d = c // heads
    shapes = {"into": (2, c, c), "qkv": (2, 3, heads, c, d), "out": (2, heads, d, c), "back": (2, c, c)}
    params = {name: torch.randn(shape) * c**-0.5 for name, shape in shapes.items()}
    biases = {"into": (2, c), "qkv": (2, 3, heads, d), "out": (2, c), "back": (2, c), "norm": (2, 3, c)}
    params |= {f"{name}_bias": torch.zeros(shape) for name, shape in biases.items()}
    return params | {"norm": torch.ones(2, 3, c)}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None, dict]:
    p, y, second = {n: t.double() for n, t in call.params.items()}, x.double(), 1 + cfg.patches[0]
    patches_a, patches_b = y[:, 1:second], y[:, second + 1 :]
    new_a, w_a = asked(y[:, 0], patches_b, {name: t[0] for name, t in p.items()}, cfg)
    new_b, w_b = asked(y[:, second], patches_a, {name: t[1] for name, t in p.items()}, cfg)
    out = torch.cat([new_a[:, None], patches_a, new_b[:, None], patches_b], dim=1)
    return out.to(x.dtype), None, {"weights": (w_a, w_b)}


def asked(cls: Tensor, patches: Tensor, p: dict[str, Tensor], cfg: Config) -> tuple[Tensor, Tensor]:
    """The class token [B, C] after it has asked the patches [B, M, C], and its weights [B, H, 1, 1 + M]."""

    def norm(t: Tensor, i: int) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * p["norm"][i]
            + p["norm_bias"][i]
        )

    def gelu(t: Tensor) -> Tensor:
        return t * (1 + torch.erf(t / 2**0.5)) / 2

    c = gelu(norm(cls, 0)) @ p["into"] + p["into_bias"]
    y = norm(torch.cat([c[:, None], patches], dim=1), 1)
    outs, weights = [], []
    for h in range(p["qkv"].shape[1]):
        w_q, w_k, w_v = p["qkv"][:, h]
        b_q, b_k, b_v = p["qkv_bias"][:, h]
        q, k, v = y[:, 0] @ w_q + b_q, y @ w_k + b_k, y @ w_v + b_v
        weights.append((torch.einsum("bd,bmd->bm", q, k) / q.shape[1] ** 0.5).softmax(-1))
        outs.append(torch.einsum("bm,bmd->bd", weights[h], v) @ p["out"][h])
    c = c + sum(outs) + p["out_bias"]
    return gelu(norm(c, 2)) @ p["back"] + p["back_bias"], torch.stack(weights, dim=1)[:, :, None]


def parts(x: Tensor, cfg: Config) -> tuple[Tensor, ...]:
    """CLS_a [B, 1, C], patches_a, CLS_b, patches_b."""
    return x.split([1, cfg.patches[0], 1, cfg.patches[1]], dim=1)


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None, dict]:
    own, (wide,) = parts(x, cfg), for_products(x)
    cls_a, patches_a, cls_b, patches_b = parts(wide, cfg)
    sides = [{name: t[side].to(wide.dtype) for name, t in call.params.items()} for side in (0, 1)]
    (new_a, w_a), (new_b, w_b) = (
        fused(cls, patches, p, cfg)
        for cls, patches, p in zip((cls_a, cls_b), (patches_b, patches_a), sides, strict=True)
    )
    # the patches are those that came in, whatever the products were made in
    out = torch.cat([new_a.to(x.dtype), own[1], new_b.to(x.dtype), own[3]], dim=1)
    return out, None, {"weights": (w_a, w_b)}


def fused(cls: Tensor, patches: Tensor, p: dict[str, Tensor], cfg: Config) -> tuple[Tensor, Tensor]:
    """(CLS [B, 1, C], its weights [B, H, 1, 1 + M]), all heads at once."""

    def norm(t: Tensor, i: int) -> Tensor:
        weight, bias, full = p["norm"][i], p["norm_bias"][i], at_least_float32(t)
        return F.layer_norm(full, t.shape[-1:], weight.to(full.dtype), bias.to(full.dtype), cfg.eps).to(
            t.dtype
        )

    c = F.gelu(norm(cls, 0)) @ p["into"] + p["into_bias"]
    y = norm(torch.cat([c, patches], dim=1), 1)[:, None]  # [B, 1, 1 + M, C]
    (w_q, w_k, w_v), (b_q, b_k, b_v) = p["qkv"], p["qkv_bias"][:, :, None]
    q, k, v = y[:, :, :1] @ w_q + b_q, y @ w_k + b_k, y @ w_v + b_v  # [B, H, ., D]
    weights = masked_softmax(scores(q, k, q.shape[3] ** -0.5))
    c = c + (mix(weights, v) @ p["out"]).sum(1) + p["out_bias"]
    return F.gelu(norm(c, 2)) @ p["back"] + p["back_bias"], weights


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    for_tokens=for_tokens,
    test_settings=({"patches": (3, 1), "eps": 1e-3},),
    exempt={
        "residual": "with weights of zero the class tokens are zero: what comes back replaces them, by the paper"
    },
    card=Card(
        title="CrossViT's fusion by class tokens",
        paper="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, arXiv:2103.14899",
        year=2021,
        idea="of two branches with patches of different size, each class token alone asks the patches of the other",
        cost="O(N·C²) time for keys and values of N tokens, and N scores a head",
        state="none: it is not causal",
        needs=("vit",),
        lineage=("softmax",),
        caveat=(
            "both branches have one width here, as they share x; the paper's differ, and W_in and W_back change it. "
            "One cross-attention an exchange, without MLP, as in the released models. The exchanges are parallel; "
            "in turn they would give the same, as a class token reads no other class token. Resizing, patches, "
            "the layers of the branches and the two heads whose logits are averaged are those of the model around it"
        ),
    ),
)
