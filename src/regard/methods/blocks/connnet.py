"""ConnNet: a mask is told as which neighbours belong together, read off features that have looked at all places.

    block    y_i = x_i + W_z Σ_j softmax_j(θ_i·φ_j) g_j            θ, φ, g = W x [C/2]: non-local, without a scale
    head     l_di = w_d·y_i + b_d                                  eight logits for each place, one for each direction
    mask     c_di = m_i m_j, j the neighbour of i in direction d; 0 where j is off the image
    decoded  i is salient where for some d  c_di >= 1/2 and c_{7-d, j} >= 1/2, 7 - d being the way back

`reference` and `fast` are the block; `logits`, `loss`, `connectivity` and `decoded` are the head and what it is taught.
A place is salient where it and a neighbour agree that they are connected, so that one wrong answer alone makes no
pixel, and what a pixel is told by eight cross-entropies says where its object goes on. A pixel without any neighbour is
connected with nothing, and is lost; all others come back. W_z is zero at first: the block begins as the identity.

Worked by hand: a row of two pixels and, away from them, one alone. The left one of the two is connected to the right
(direction 4 of 0 .. 7, row by row around the place), the right one to the left (3), the third with none.

>>> mask = torch.tensor([[[1.0, 1.0, 0.0, 1.0]]])
>>> connectivity(mask)[0].nonzero().tolist()  # direction, row, column
[[3, 0, 1], [4, 0, 0]]
>>> decoded(connectivity(mask)).int().tolist()
[[[1, 1, 0, 0]]]

And of the block: with queries of zero both places read the mean of g = 1 and 3, which W_z adds to the second channel.

>>> zero = {f"{name}_bias": torch.zeros(1) for name in NAMES} | {"out_bias": torch.zeros(2)}
>>> p = {"theta": torch.zeros(1, 2), "phi": torch.ones(1, 2), "g": torch.tensor([[1.0, 0.0]]), **zero}
>>> p["out"] = torch.tensor([[0.0], [1.0]])
>>> reference(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), Config(), Call("self", params=p))[0].tolist()
[[[1.0, 2.0], [3.0, 2.0]]]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.block import BlockPage
from regard.ops import for_products, softmax_attention
from regard.ops.grid import any_grid, as_image
from regard.ops.grid.padded import shifted

NAMES = ("theta", "phi", "g")


@dataclass(frozen=True)
class Config:
    squeeze: int = 2  # what is compared and summed has C / squeeze channels

    def __post_init__(self) -> None:
        require(self.squeeze >= 1, "squeeze >= 1", squeeze=self.squeeze)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    c, inner = dims["width"], dims["width"] // cfg.squeeze
    require(c % cfg.squeeze == 0, "the width is a multiple of squeeze", width=c, squeeze=cfg.squeeze)
    params = {name: torch.empty(inner, c).uniform_(-1, 1) * c**-0.5 for name in NAMES}
    params |= {name + "_bias": torch.empty(inner).uniform_(-1, 1) * c**-0.5 for name in NAMES}
    return params | {"out": torch.zeros(c, inner), "out_bias": torch.zeros(c)}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p, x64 = {name: t.double() for name, t in call.params.items()}, x.double()
    theta, phi, g = (torch.einsum("bnc,dc->bnd", x64, p[n]) + p[n + "_bias"] for n in NAMES)
    weights = torch.einsum("bnd,bmd->bnm", theta, phi).softmax(-1)
    mixed = torch.einsum("bnm,bmd->bnd", weights, g)
    return (x64 + torch.einsum("bnd,cd->bnc", mixed, p["out"]) + p["out_bias"]).to(x.dtype), None


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    dtype, (x,) = x.dtype, for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    theta, phi, g = (F.linear(x, p[name], p[name + "_bias"])[:, None] for name in NAMES)
    mixed = softmax_attention(theta, phi, g, scale=1.0)[:, 0]
    return (x + F.linear(mixed, p["out"], p["out_bias"])).to(dtype), None


# the head: eight answers for each place


def logits(y: Tensor, weight: Tensor, bias: Tensor, sides: Sides) -> Tensor:
    """[B, 8, rows, columns] of tokens [B, N, C], by weight [8, C] and bias [8]."""
    return as_image(F.linear(y, weight, bias), sides)


def neighbours(maps: Tensor) -> Tensor:
    """[..., 8, rows, columns]: the neighbours of each place of [..., rows, columns], zero off the image."""
    views = shifted(maps, tuple(maps.shape[-2:]), 3)
    return torch.stack(views[:4] + views[5:], dim=-3)


def connectivity(mask: Tensor) -> Tensor:
    """[B, 8, rows, columns] of a mask [B, rows, columns] of zeros and ones: what the head is taught."""
    return mask[:, None] * neighbours(mask)


def loss(found: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy, over directions, places and images, of logits [B, 8, rows, columns]."""
    return F.binary_cross_entropy_with_logits(found, connectivity(mask).to(found.dtype))


def decoded(connected: Tensor, above: float = 0.5) -> Tensor:
    """The mask [B, rows, columns] bool that connectivities [B, 8, rows, columns] agree on, both ways, >= `above`."""
    yes = (connected >= above).to(connected.dtype)
    back = torch.stack(
        [neighbours(yes[:, 7 - d])[:, d] for d in range(8)], dim=1
    )  # at i: c_{7-d} of its neighbour d
    return (yes * back).amax(1) > 0


def permutes(cfg: Config) -> bool:
    return True


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid, axes=(1, 2, 3), permutes=permutes),
    test_settings=({"squeeze": 1},),
    card=Card(
        title="ConnNet: pixel connectivity over non-local features",
        paper=(
            "ConnNet: A Long-Range Relation-Aware Pixel-Connectivity Network for Salient Segmentation, "
            "arXiv:1804.07836"
        ),
        year=2018,
        idea="a mask is predicted as eight maps of which neighbours belong together, and read where both ends agree",
        cost="O(N²·C) time; the head O(N·C)",
        state="none",
        needs=("cnn-features",),
        lineage=("softmax",),
        caveat=(
            "no code of the paper was found: the bar of 1/2 on both ends is the rule of later work of the same family, "
            "and instances are not told apart. Where labels are wrong at random it is too high: pairs are right less "
            "often than pixels (see the claim). Pixels without a salient neighbour are lost. The non-local block is an "
            "embedded Gaussian, with W_z zero at first and no batch norm; the CNN before it is a network's own"
        ),
    ),
)
