"""MEDUSA: one attention body draws a map of the whole image, and a small head at each stage weighs places by it.

    G   = body(image)                                  an encoder-decoder, once; G [B, maps, rows, columns]
    M_j = σ(w · relu(conv3x3([resize(G), F_j])) + b)   the head of stage j; M_j [B, 1, rows_j, columns_j]
    Y_j = M_j ⊙ F_j
    body: e_0 = relu(conv(image)),  e_l = relu(conv of stride 2 (e_{l-1})),  d_L = e_L
          d_{l-1} = relu(conv(resize(d_l) + e_{l-1})),  G = conv1x1(d_0)

Modules that stand at each stage by themselves see what that stage sees. Here all stages are told the same of the whole
image by one body, which may be as large as all of theirs, and each still answers at its own scale.

The page is one stage that draws its map from its own x. A network of several stages calls `body` once, on the image or
on early features, and `rescaled` with its map at each stage; `init_body` and `init_head` give the numbers of either.

Worked by hand, one channel of two places 1 and 3, convolutions passing on what stands in their middle: e_0 = (1, 3),
e_1 = 1, d_0 = G = (1 + 1, 1 + 3); the head reads G alone: 1 · σ(2) and 3 · σ(4).

>>> cfg = Config(channels=1, levels=1, hidden=1)
>>> params = {name: torch.zeros_like(p) for name, p in init(cfg, {"width": 1}).items()}
>>> for name in ("enter", "down", "up", "read"):
...     params[name].flatten()[4] = 1
>>> params |= {"draw": torch.ones(1, 1), "weigh": torch.ones(1, 1)}
>>> call = Call("self", params=params, grid=(1, 2))
>>> [round(y, 3) for y in reference(torch.tensor([[[1.0], [3.0]]]), cfg, call)[0].flatten().tolist()]
[0.881, 2.946]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32
from regard.ops.grid import any_grid, as_image, as_tokens

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Config:
    channels: int = 16  # of the body
    levels: int = 3  # how often the body halves the image
    maps: int = 1  # that the body draws
    hidden: int = 8  # channels in the middle of a head

    def __post_init__(self) -> None:
        smallest = min(self.channels, self.levels, self.maps, self.hidden)
        require(smallest >= 1, "channels, levels, maps and hidden are at least 1", cfg=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    return init_body(cfg, dims["width"]) | init_head(cfg, dims["width"])


def init_body(cfg: Config, width: int) -> dict[str, Tensor]:
    """Of a body that reads images of so many channels."""
    c = cfg.channels
    params = {
        "enter": kaiming(c, width, 3, 3, fan=9 * width),
        "down": kaiming(cfg.levels, c, c, 3, 3, fan=9 * c),
        "up": kaiming(cfg.levels, c, c, 3, 3, fan=9 * c),  # the first is that of the coarsest level
        "draw": kaiming(cfg.maps, c, fan=c),
    }
    shapes = {"enter": (c,), "down": (cfg.levels, c), "up": (cfg.levels, c), "draw": (cfg.maps,)}
    return params | {f"{name}_bias": torch.zeros(shape) for name, shape in shapes.items()}


def init_head(cfg: Config, width: int) -> dict[str, Tensor]:
    """Of the head of a stage of so many channels."""
    return {
        "read": kaiming(cfg.hidden, cfg.maps + width, 3, 3, fan=9 * (cfg.maps + width)),
        "weigh": kaiming(1, cfg.hidden, fan=cfg.hidden),
        "read_bias": torch.zeros(cfg.hidden),
        "weigh_bias": torch.zeros(1),
    }


def kaiming(*shape: int, fan: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1) * (6 / fan) ** 0.5


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p = {name: t.double() for name, t in call.params.items()}
    image = x.double().mT.unflatten(2, call.sides)
    levels = [slow_conv(image, p["enter"], p["enter_bias"]).relu()]
    for i in range(cfg.levels):
        levels.append(slow_conv(levels[i], p["down"][i], p["down_bias"][i])[..., ::2, ::2].relu())
    d = levels[-1]
    for i in range(cfg.levels):
        e = levels[cfg.levels - 1 - i]
        d = slow_conv(slow_resize(d, tuple(e.shape[2:])) + e, p["up"][i], p["up_bias"][i]).relu()
    drawn = torch.einsum("bcij,mc->bmij", d, p["draw"]) + p["draw_bias"][:, None, None]
    return slow_rescaled(image, drawn, p).flatten(2).mT.to(x.dtype), None


def slow_rescaled(image: Tensor, drawn: Tensor, p: Params) -> Tensor:
    seen = torch.cat([slow_resize(drawn, tuple(image.shape[2:])), image], dim=1)
    middle = slow_conv(seen, p["read"], p["read_bias"]).relu()
    return image * (torch.einsum("bhij,nh->bnij", middle, p["weigh"]) + p["weigh_bias"]).sigmoid()


def slow_conv(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tap by tap; off the image stand zeros."""
    wide, (rows, columns) = F.pad(image, (1, 1, 1, 1)), image.shape[2:]
    taps = [(i, j) for i in range(3) for j in range(3)]
    moved = torch.stack([wide[..., i : i + rows, j : j + columns] for i, j in taps], dim=2)  # [B, C, 9, ...]
    return torch.einsum("bctij,kct->bkij", moved, weight.flatten(2)) + bias[:, None, None]


def slow_resize(image: Tensor, sides: Sides) -> Tensor:
    y, x = (shares(old, new).to(image) for old, new in zip(image.shape[2:], sides, strict=True))
    return torch.einsum("bcij,yi,xj->bcyx", image, y, x)


def shares(old: int, new: int) -> Tensor:
    """[new, old]: how much of each old place is in a new one, by the distance of their middles; borders reach out."""
    at = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    image = as_image(at_least_float32(x), call.sides)
    return as_tokens(rescaled(image, body(image, call.params), call.params)).to(x.dtype), None


def body(image: Tensor, params: Params) -> Tensor:
    """G [B, maps, rows, columns] of an image [B, C, rows, columns]."""
    p = {name: t.to(image.dtype) for name, t in params.items()}
    levels = [F.conv2d(image, p["enter"], p["enter_bias"], padding=1).relu()]
    for weight, bias in zip(p["down"], p["down_bias"], strict=True):
        levels.append(F.conv2d(levels[-1], weight, bias, stride=2, padding=1).relu())
    d = levels.pop()
    for weight, bias in zip(p["up"], p["up_bias"], strict=True):
        e = levels.pop()
        d = F.conv2d(resized(d, e.shape[2:]) + e, weight, bias, padding=1).relu()
    return F.conv2d(d, p["draw"][..., None, None], p["draw_bias"])


def rescaled(image: Tensor, drawn: Tensor, params: Params) -> Tensor:
    """Y_j of the features of a stage [B, C, rows_j, columns_j] and of G, whatever its sides."""
    p = {name: t.to(image.dtype) for name, t in params.items()}
    seen = torch.cat([resized(drawn.to(image.dtype), image.shape[2:]), image], dim=1)
    middle = F.conv2d(seen, p["read"], p["read_bias"], padding=1).relu()
    return image * F.conv2d(middle, p["weigh"][..., None, None], p["weigh_bias"]).sigmoid()


def resized(image: Tensor, sides: Sides) -> Tensor:
    return F.interpolate(image, tuple(sides), mode="bilinear", align_corners=False)


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid),
    exempt={"residual": "y = x · σ, x / 2 with weights of zero"},
    test_settings=({"channels": 3, "levels": 1, "maps": 2, "hidden": 2},),
    card=Card(
        title="MEDUSA: one body of attention, heads at many scales",
        paper=(
            "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image "
            "Analysis, arXiv:2110.06063"
        ),
        year=2021,
        idea="an encoder-decoder maps the whole image once; a small head at each stage weighs its places by that map",
        cost="O(N·(channels² + C·hidden)) time, the body once for all stages",
        state="none",
        needs=("cnn-features",),
        lineage=("softmax",),
        caveat=(
            "the page is one stage whose map is drawn from its own x: pages at several stages share nothing. The "
            "network of the paper calls `body` once and `rescaled` at each stage. The paper was not read in full and "
            "no code was found: sizes and skips of the body, a map without a norm, a head of two layers and one map "
            "for all channels are this page's. Maps near 1/2 shrink features at every stage: a norm should follow, "
            "or the body be trained before"
        ),
    ),
)
