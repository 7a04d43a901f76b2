"""Polarized self-attention: an image is weighed channel by channel and pixel by pixel, each at full resolution.

    channels  a_c = σ(LN(W_z (W_v X softmax(W_q X))))          softmax over the N pixels; W_q [1, C], W_v [C/2, C]
    pixels    a_n = σ(softmax(mean(U_q X)) · U_v X)            mean over pixels, softmax over C/2; U_q, U_v [C/2, C]
    parallel  Y = a_c X + a_n X          sequential  Y = a_n(a_c X) a_c X

What is polarized: a branch folds one direction away altogether, and keeps half of the channels or all pixels of the
other, where a softmax spreads the range that folding took and a sigmoid maps it onto (0, 1). Nothing looks at where a
pixel stands: pixels that change places change the places of the outputs and nothing else.

Both branches are linear in X before their sigmoids, so `fast` folds X first and maps the C numbers that are left.

Worked by hand: two pixels (1, 0) and (3, 0). With W_q = 0 the channel branch reads their mean, W_v takes its first
channel, 2, W_z makes it 2 and -2, which LN makes 1 and -1. U_v reads the second channel, so a_n = 1/2. Parallel: 1 and
3 times σ(1) + 1/2; sequential: times σ(1) / 2.

>>> x, call = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), Call(grid=(1, 2))
>>> params = {name: torch.zeros_like(p) for name, p in init(Config(), {"width": 2}).items()}
>>> params |= {"v": torch.tensor([[1.0, 0.0]]), "up": torch.tensor([[1.0], [-1.0]]), "norm": torch.ones(2)}
>>> params |= {"pixel_v": torch.tensor([[0.0, 1.0]])}
>>> for layout in ("parallel", "sequential"):
...     out = reference(x, Config(layout), call.with_(params=params))[0]
...     [round(y, 3) for y in out[0, :, 0].tolist()]
[1.231, 3.693]
[0.366, 1.097]
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32
from regard.ops.grid import any_grid

Layout = Literal["parallel", "sequential"]


@dataclass(frozen=True)
class Config:
    layout: Layout = "parallel"  # the sum of both branches, or "sequential": pixels of what channels gave
    eps: float = 1e-5  # of the norm

    def __post_init__(self) -> None:
        layouts = get_args(Layout)
        require(self.layout in layouts, f"layout is one of {layouts}", layout=self.layout)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    c = dims["width"]
    require(c % 2 == 0, "the width is even: branches keep half of the channels", width=c)
    shapes = {
        "q": (1, c),
        "v": (c // 2, c),
        "up": (c, c // 2),
        "pixel_q": (c // 2, c),
        "pixel_v": (c // 2, c),
    }
    params = {name: torch.empty(shape).uniform_(-1, 1) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return params | {"norm": torch.ones(c), "norm_bias": torch.zeros(c)}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double().mT  # [B, C, N]
    weighed = x64 * slow_channels(x64, p, cfg)
    if cfg.layout == "sequential":
        out = weighed * slow_pixels(weighed, p)
    else:
        out = weighed + x64 * slow_pixels(x64, p)
    return out.mT.to(x.dtype), None


def slow_channels(x: Tensor, p: dict[str, Tensor], cfg: Config) -> Tensor:
    """[B, C, 1] weights of the channels of x [B, C, N]."""
    q = (p["q"] @ x).softmax(-1)  # [B, 1, N]
    z = p["up"] @ ((p["v"] @ x) @ q.mT)  # [B, C, 1]
    centred = z - z.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + cfg.eps).sqrt()
    return (normed * p["norm"][:, None] + p["norm_bias"][:, None]).sigmoid()


def slow_pixels(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[B, 1, N] weights of the pixels of x [B, C, N]."""
    q = (p["pixel_q"] @ x).mean(-1, keepdim=True).softmax(1)  # [B, C/2, 1]
    return (q.mT @ (p["pixel_v"] @ x)).sigmoid()


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    full = at_least_float32(x)
    by_channel = channels(full, call, cfg)  # [B, 1, C]
    if cfg.layout == "sequential":
        full = full * by_channel
        return (full * pixels(full, call)).to(x.dtype), None
    return (full * (by_channel + pixels(full, call))).to(x.dtype), None


def channels(x: Tensor, call: Call, cfg: Config) -> Tensor:
    q, v, up, norm, bias = (call.params[n].to(x.dtype) for n in ("q", "v", "up", "norm", "norm_bias"))
    folded = (x @ q.mT).softmax(1).mT @ x  # [B, 1, C]
    return F.layer_norm(folded @ v.mT @ up.mT, norm.shape, norm, bias, cfg.eps).sigmoid()


def pixels(x: Tensor, call: Call) -> Tensor:
    q, v = (call.params[name].to(x.dtype) for name in ("pixel_q", "pixel_v"))
    folded = (x.mean(1, keepdim=True) @ q.mT).softmax(-1) @ v  # [B, 1, C]
    return (x @ folded.mT).sigmoid()  # [B, N, 1]


def permutes(cfg: Config) -> bool:
    return True


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid, axes=(1, 2, 3), permutes=permutes),
    exempt={"residual": "y = x · a, x / 4 with weights of zero; in parallel it is x / 2 + x / 2"},
    test_settings=({"layout": "sequential"},),
    card=Card(
        title="Polarized self-attention",
        paper="Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv:2107.00782",
        year=2021,
        idea="one branch weighs channels after folding all pixels, one weighs pixels after folding all channels",
        cost="O(N·C + C²) time",
        state="none",
        needs=("cnn-features",),
        lineage=("softmax",),
        caveat=(
            "the page is the paper's mathematics, without biases in the projections; the released code differs. Its "
            "parallel form has no norm in the channel branch; its sequential form squeezes C/2 to C/8 there, with a "
            "norm and a ReLU between two biased maps. Its pixel branches never take a softmax over C/2: the parallel "
            "one takes it over all pixels of the product, before the sigmoid, so that the weights stay near 1/2, the "
            "sequential one over the pixels of each value channel, before the product with the query as it is"
        ),
    ),
)
