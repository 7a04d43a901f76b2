"""MULTI-LANE: beside a frozen layer of a ViT each task has a lane of its own, which reads the image as a few summaries.

    x = [CLS_1, selectors_1.., .., CLS_T, selectors_T.., image..],   y = LN(x)
    summary_t = softmax(selectors_t imageᵀ / √C) image            of y, without any projection
    u_t       = [CLS_t, summary_t]
    o_t       = W_o softmax(q kᵀ / √D) v                          q of u_t; k, v of prompts_t, then of u_t
    x'    = x + [o_t of CLS_t, y of selectors_t, .., attention of the image to itself]
    out   = x' + W_2 gelu(W_1 LN(x') + b_1) + b_2                 the same for all tokens

A lane reads its own tokens and the image, the image reads itself alone: no number of one lane depends on another lane's
selectors and prompts, so a task that is learned later moves nothing of those before. All weights but `prompts` are the
ViT's and stay frozen. What attention makes of the summaries is dropped (drop-and-replace): selectors go on to ask the
next layer. S + 1 tokens ask each other in a lane where it would be N + 1, so T lanes can run beside each other; and as
all outputs but that of CLS are dropped, `fast` asks with CLS alone.

With "kept" summaries go on as tokens of the lane, and with "none" its tokens ask each other as they are: a first layer
of the one and others of the other summarise once, which the paper compares. Then a lane's attention is quadratic in S.

Worked by hand: two channels, of which LN leaves the signs; v is what is read, W_o the identity, queries and the MLP are
zero. The selector is (+, -), as is the first of two image tokens; the other one is (-, +). Scores ±2 / √2 make it
0.9442 of the first and 0.0558 of the second, (0.8884, -0.8884). CLS, (-, +), takes the mean of that and of itself:
-0.0558 and 0.0558. The selector adds its signs; the two image tokens cancel out.

>>> params = {name: torch.zeros_like(p) for name, p in init(Config(1, 1, 0), {"width": 2, "heads": 1}).items()}
>>> params["ln_1"], params["out"], params["qkv"][2, 0] = torch.ones(2), torch.eye(2), torch.eye(2)
>>> x = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [4.0, 0.0], [0.0, 4.0]]])
>>> out = reference(x, Config(lanes=1, selectors=1, prompts=0, eps=1e-9), Call("self", params=params))[0]
>>> [round(number, 4) for number in out.flatten().tolist()]
[0.9442, 3.0558, 4.0, 0.0, 4.0, 0.0, 0.0, 4.0]
"""

from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, softmax_attention

SUMMARIES = ("dropped", "kept", "none")


@dataclass(frozen=True)
class Config:
    lanes: int = 8  # T, the tasks so far: 80 classes of COCO, ten at a time
    selectors: int = 20  # S of each lane
    prompts: int = 20  # of each lane; the paper's layers after the fifth have none
    summaries: Literal["dropped", "kept", "none"] = "dropped"  # once attention has read them
    expand: int = 4  # width of the MLP's middle, in widths of the layer
    eps: float = 1e-6  # of the norms

    def __post_init__(self) -> None:
        least = min(self.lanes, self.selectors, self.expand)
        require(least >= 1, "lanes, selectors and expand are at least 1", cfg=self)
        require(self.prompts >= 0, "prompts >= 0", prompts=self.prompts)
        require(self.summaries in SUMMARIES, f"summaries is one of {SUMMARIES}", summaries=self.summaries)

    @property
    def own(self) -> int:
        """Tokens of all lanes; the image's follow."""
        return self.lanes * (1 + self.selectors)


def for_tokens(cfg: Config, n: int) -> Config:
    """The settings as they are where the image has a token left among n, else lanes for about half of them."""
    require(n >= 3, "a class token, a selector, and a token of the image", tokens=n)
    if cfg.own < n:
        return cfg
    room = max(n // 2, 2)
    lanes = min(cfg.lanes, isqrt(room))
    return replace(cfg, lanes=lanes, selectors=min(cfg.selectors, room // lanes - 1))


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """`prompts`, of keys and of values, are all that belongs to lanes; the rest is the frozen ViT's."""
    c, heads, inner = dims["width"], dims["heads"], cfg.expand * dims["width"]
    require(c % heads == 0, "the width is a multiple of the heads", width=c, heads=heads)
    d = c // heads
    shapes = {"qkv": (3, heads, d, c), "out": (c, c), "up": (inner, c), "down": (c, inner)}
    params = {name: torch.empty(shape).uniform_(-1, 1) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    params |= {f"{name}_bias": torch.zeros(shape[:-1]) for name, shape in shapes.items()}
    params |= {"ln_1": torch.ones(c), "ln_2": torch.ones(c)}
    params |= {"ln_1_bias": torch.zeros(c), "ln_2_bias": torch.zeros(c)}
    if cfg.prompts:
        params["prompts"] = torch.empty(2, cfg.lanes, heads, cfg.prompts, d).uniform_(-1, 1)
    return params


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double()
    y = slow_norm(x64, p, "ln_1", cfg)
    parts = list(y.split([1, cfg.selectors] * cfg.lanes + [y.shape[1] - cfg.own], dim=1))
    image, added = parts.pop(), []
    for t in range(cfg.lanes):
        cls, selectors = parts[2 * t : 2 * t + 2]
        u = torch.cat([cls, selectors if cfg.summaries == "none" else slow_summary(selectors, image)], dim=1)
        asked = slow_attention(u, p, p["prompts"][:, t] if cfg.prompts else None)
        added.append(torch.cat([asked[:, :1], selectors], dim=1) if cfg.summaries == "dropped" else asked)
    x64 = x64 + torch.cat([*added, slow_attention(image, p)], dim=1)
    middle = torch.einsum("bnc,dc->bnd", slow_norm(x64, p, "ln_2", cfg), p["up"]) + p["up_bias"]
    gelu = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    return (x64 + torch.einsum("bnc,dc->bnd", gelu, p["down"]) + p["down_bias"]).to(x.dtype), None


def slow_norm(x: Tensor, p: dict[str, Tensor], name: str, cfg: Config) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * p[name] + p[name + "_bias"]


def slow_summary(selectors: Tensor, image: Tensor) -> Tensor:
    """[B, S, C]: the image as each selector sees it."""
    s = torch.einsum("bsc,bnc->bsn", selectors, image) / image.shape[2] ** 0.5
    return torch.einsum("bsn,bnc->bsc", s.softmax(-1), image)


def slow_attention(u: Tensor, p: dict[str, Tensor], prompts: Tensor | None = None) -> Tensor:
    """Of tokens [B, n, C] among themselves and the prompts [2, H, K, D], a head at a time."""
    heads = []
    for h in range(p["qkv"].shape[1]):
        q, k, v = torch.einsum("bnc,pdc->pbnd", u, p["qkv"][:, h]) + p["qkv_bias"][:, h][:, None, None]
        if prompts is not None:
            k, v = (
                torch.cat([s[h].expand(len(u), -1, -1), t], dim=1)
                for s, t in zip(prompts, (k, v), strict=True)
            )
        weights = (torch.einsum("bnd,bmd->bnm", q, k) / q.shape[2] ** 0.5).softmax(-1)
        heads.append(torch.einsum("bnm,bmd->bnd", weights, v))
    return torch.einsum("bnc,dc->bnd", torch.cat(heads, dim=2), p["out"]) + p["out_bias"]


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    dtype, (x,) = x.dtype, for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    y = layer_norm(x, p, "ln_1", cfg)
    own, image = y[:, : cfg.own].unflatten(1, (cfg.lanes, -1)), y[:, cfg.own :]  # [B, T, 1 + S, C], [B, N, C]
    cls, selectors = own.split([1, cfg.selectors], dim=2)
    u = own if cfg.summaries == "none" else torch.cat([cls, summary(selectors, image)], dim=2)
    asked = lanes_attention(cls if cfg.summaries == "dropped" else u, u, p)
    added = torch.cat([asked, selectors], dim=2) if cfg.summaries == "dropped" else asked
    q, k, v = (project(image, p, i).transpose(1, 2) for i in range(3))
    seen = softmax_attention(q, k, v, scale=q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    x = x + torch.cat([added.flatten(1, 2), F.linear(seen, p["out"], p["out_bias"])], dim=1)
    middle = F.gelu(F.linear(layer_norm(x, p, "ln_2", cfg), p["up"], p["up_bias"]))
    return (x + F.linear(middle, p["down"], p["down_bias"])).to(dtype), None


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str, cfg: Config) -> Tensor:
    full = at_least_float32(x)
    weight, bias = p[name].to(full.dtype), p[name + "_bias"].to(full.dtype)
    return F.layer_norm(full, full.shape[-1:], weight, bias, cfg.eps).to(x.dtype)


def summary(selectors: Tensor, image: Tensor) -> Tensor:
    """[B, T, S, C]: cross attention of one head in which the image is keys and values as it stands."""
    image = image[:, None]
    asked = softmax_attention(selectors.flatten(1, 2)[:, None], image, image, scale=image.shape[3] ** -0.5)
    return asked.view(selectors.shape)


def project(u: Tensor, p: dict[str, Tensor], i: int) -> Tensor:
    """[..., n, H, D]: queries, keys or values."""
    return F.linear(u, p["qkv"][i].flatten(0, 1), p["qkv_bias"][i].flatten()).unflatten(
        -1, p["qkv"].shape[1:3]
    )


def lanes_attention(asking: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Of tokens [B, T, m, C] to those of their lane [B, T, n, C] and its prompts; lanes are rows of the batch."""
    q, k, v = (project(t, p, i).transpose(2, 3) for i, t in enumerate((asking, u, u)))  # [B, T, H, ., D]
    if "prompts" in p:
        more = p["prompts"][:, None].expand(-1, len(u), -1, -1, -1, -1)
        k, v = torch.cat([more[0], k], dim=3), torch.cat([more[1], v], dim=3)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    seen = softmax_attention(q, k, v, scale=q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    return F.linear(seen, p["out"], p["out_bias"]).view(asking.shape)


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    for_tokens=for_tokens,
    test_settings=(
        {"lanes": 3, "selectors": 2, "prompts": 3, "expand": 1},
        {"lanes": 2, "selectors": 1, "prompts": 0, "summaries": "none"},
        {"lanes": 2, "selectors": 3, "prompts": 2, "summaries": "kept", "eps": 1e-3},
    ),
    card=Card(
        title="MULTI-LANE: a lane of summarised patches for each task",
        paper=(
            "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning, "
            "arXiv:2405.15633"
        ),
        year=2024,
        idea="beside a frozen ViT each task's class token reads summaries that its own selectors make of the image",
        cost="O(T·S·N·C) time for the summaries of T lanes, T·(S + K) scores a head with K prompts; the ViT's own N²",
        state="none",
        needs=("vit",),
        lineage=("softmax",),
        caveat=(
            "the page is one layer: lanes' tokens stand before the image's in x, and whoever builds the model starts "
            "each lane with a class token and its selectors, freezes all but selectors, prompts and heads, and reads "
            "a lane's logits off its class token. As released, norms are the frozen ViT's and shared, and selectors "
            "pass a layer with their own normed values added, as what stands in the place of the dropped summaries. "
            "There one linear head serves all classes, masked for each task. The paper's layers after the fifth have "
            "no prompts: prompts=0. A lane costs S + 1 tokens a layer, so all of them grow with the tasks"
        ),
    ),
)
