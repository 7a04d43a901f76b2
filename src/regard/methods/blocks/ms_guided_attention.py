"""Guided dual attention: places look at all places, channels at those least like them, twice, the second pass guided.

    position  P_i = Σ_j softmax_j(q_i·k_j) v_j              q = W_q x, k = W_k x [C/8], v = W_v x [C]; no scale
    channel   H_c = Σ_d softmax_d(max_d e_cd - e_cd) x_d    e = Xᵀ X [C, C], sums over all places; nothing learned
    out       x + γ_p P + γ_c H                             γ_p = γ_c = 0 at first: the block begins as the identity
    loss      Σ CE + 0.25 Σ |z_1 - z_2|² + 0.1 Σ |x - D(E(x))|²        z = E(x), codes of what the passes read

A network for segmentation asks this block twice at each of its scales. An encoder E and a decoder D read what each pass
reads, and what is decoded is multiplied into what the pass gives. `guided` is the loss of both passes, `guide` and
`reconstruction` are its last two sums, |·|² a mean square: codes of the first pass are held to those of the second, and
must hold what was read. Products less than a row's maximum weigh more, so a channel mixes in those unlike it.

Worked by hand: two places, channels (1, 2) and (0, 1), so e = [[5, 2], [2, 1]]. The first channel takes σ(-3) of itself
and σ(3) of the other, the second σ(1) of itself and σ(-1) of the first.

>>> x, call = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]), Call(grid=(1, 2))
>>> params = init(Config("channel"), {"width": 2}) | {"channel_gamma": torch.ones(1)}
>>> y = reference(x, Config("channel"), call.with_(params=params))[0] - x
>>> [round(t, 4) for t in y.flatten().tolist()]  # σ(-3) 1, σ(-1) 1; σ(-3) 2 + σ(3) 1, σ(-1) 2 + σ(1) 1
[0.0474, 0.2689, 1.0474, 1.2689]
>>> codes, read, made = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.ones(2)
>>> entropies = [torch.tensor(0.5), torch.tensor(0.25)]
>>> round(guided(entropies, [(codes, codes + 2)], [(read, made), (read, made)]).item(), 4)  # 0.75 + 0.25 · 4 + 0.1 · 2
1.95
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, softmax_attention
from regard.ops.grid import any_grid

Attention = Literal["both", "position", "channel"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    attention: Attention = "both"  # or one of the two alone
    squeeze: int = 8  # queries and keys of positions have C / squeeze channels

    def __post_init__(self) -> None:
        known = get_args(Attention)
        require(self.attention in known, f"attention is one of {known}", attention=self.attention)
        require(self.squeeze >= 1, "squeeze >= 1", squeeze=self.squeeze)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    c, params = dims["width"], {}
    if cfg.attention != "channel":
        require(c % cfg.squeeze == 0, "the width is a multiple of squeeze", width=c, squeeze=cfg.squeeze)
        for name, width in (("q", c // cfg.squeeze), ("k", c // cfg.squeeze), ("v", c)):
            params[name] = torch.empty(width, c).uniform_(-1, 1) * c**-0.5
            params[name + "_bias"] = torch.empty(width).uniform_(-1, 1) * c**-0.5
        params["position_gamma"] = torch.zeros(1)
    if cfg.attention != "position":
        params["channel_gamma"] = torch.zeros(1)
    return params


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double()
    out = x64
    if cfg.attention != "channel":
        q, k, v = (torch.einsum("bnc,dc->bnd", x64, p[n]) + p[n + "_bias"] for n in ("q", "k", "v"))
        weights = torch.einsum("bnd,bmd->bnm", q, k).softmax(-1)
        out = out + p["position_gamma"] * torch.einsum("bnm,bmc->bnc", weights, v)
    if cfg.attention != "position":
        energy = torch.einsum("bnc,bnd->bcd", x64, x64)
        weights = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        out = out + p["channel_gamma"] * torch.einsum("bcd,bnd->bnc", weights, x64)
    return out.to(x.dtype), None


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    full = out = at_least_float32(x)
    if cfg.attention != "channel":
        out = out + call.params["position_gamma"].to(full.dtype) * positions(x, call)
    if cfg.attention != "position":
        weights = (-full.mT @ full).softmax(-1)  # [B, C, C]; a row's maximum is the same for all of it
        out = out + call.params["channel_gamma"].to(full.dtype) * (full @ weights.mT)
    return out.to(x.dtype), None


def positions(x: Tensor, call: Call) -> Tensor:
    (x,) = for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    q, k, v = (F.linear(x, p[name], p[name + "_bias"])[:, None] for name in ("q", "k", "v"))
    return at_least_float32(softmax_attention(q, k, v, scale=1.0)[:, 0])


def guided(
    entropies: Iterable[Tensor], codes: Iterable[Pair], images: Iterable[Pair], *, guide_weight: float = 0.25,
    reconstruction_weight: float = 0.1,
) -> Tensor:  # fmt: skip
    """The loss of both passes at all scales.

    entropies  cross-entropies of the predictions, one for each scale and pass
    codes      (E(what the first pass reads), E(what the second reads)) of each scale
    images     (what a pass reads, what is decoded of its code), one for each scale and pass
    """
    errors = guide_weight * guide(codes) + reconstruction_weight * reconstruction(images)
    return torch.stack([*entropies]).sum() + errors


def guide(codes: Iterable[Pair]) -> Tensor:
    """Sum over scales of the mean square between the codes of the two passes."""
    return torch.stack([F.mse_loss(first, second) for first, second in codes]).sum()


def reconstruction(images: Iterable[Pair]) -> Tensor:
    """Sum over scales and passes of the mean square between what was read and what was decoded of it."""
    return torch.stack([F.mse_loss(made, read) for read, made in images]).sum()


def permutes(cfg: Config) -> bool:
    return True


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid, axes=(1, 2, 3), permutes=permutes),
    test_settings=({"attention": "position", "squeeze": 2}, {"attention": "channel"}),
    card=Card(
        title="Guided dual attention, of places and of channels",
        paper="Multi-scale self-guided attention for medical image segmentation, arXiv:1906.02849",
        year=2019,
        idea="attention of places and of channels at each scale, in two passes whose codes are held to each other",
        cost="O(N²·C + N·C²) time",
        state="none",
        needs=("cnn-features",),
        lineage=("softmax",),
        caveat=(
            "the page is DANet's two modules and their sum with one residual, and the losses; scales, convolutions "
            "about the modules, and the encoders are a network's own. There each module adds its own residual, so that "
            "the two together begin as 2 x. Softmax is over the maximum of a row less the products, as released: "
            "channels mix with those least like them. Codes of both passes get the gradient of the guide"
        ),
    ),
)
