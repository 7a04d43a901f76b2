"""ELA, efficient local attention: a channel of an image is weighed by a profile of its rows and one of its columns.

    z_h[c, i] = mean over j of x[c, i, j]        z_w[c, j] = mean over i of x[c, i, j]
    a_h = σ(GN(conv1d(z_h)))                     a_w = σ(GN(conv1d(z_w)))
    y[c, i, j] = x[c, i, j] · a_h[c, i] · a_w[c, j]

Strips are long and thin, so a profile says where along one axis something stands without mixing in the other one.
All C channels are kept where Coordinate Attention squeezes them, and a norm over groups of channels stands where that
has one over the batch. The map of a channel is an outer product: of rank one.

Worked by hand: one channel, rows of ones and of threes, a convolution that passes on what it gets. The rows' means 1
and 3 are normed to -1 and 1, the columns' to 0: ones become 1 · σ(-1) · 1/2, threes 3 · σ(1) · 1/2.

>>> cfg, x = Config(kernel=1), torch.tensor([1.0, 1.0, 3.0, 3.0]).view(1, 4, 1)
>>> params = init(cfg, {"width": 1}) | {"conv": torch.ones(1, 1, 1, 1)}
>>> [round(y, 3) for y in reference(x, cfg, Call(params=params, grid=(2, 2)))[0].flatten().tolist()]
[0.134, 0.134, 1.097, 1.097]
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32
from regard.ops.grid import any_grid, as_image, as_tokens

# kernel, channels that are convolved together, groups of the norm
VARIANTS = {"T": (5, 1, 32), "B": (7, 1, 16), "S": (5, 8, 16), "L": (7, 8, 16)}


@dataclass(frozen=True)
class Config:
    # what None stands for below; B and L have the wider kernel, S and L convolve 8 channels together
    variant: Literal["T", "B", "S", "L"] = "B"
    kernel: int | None = None  # odd; None here and below: the variant's
    groups: int | None = None  # of the convolution
    norm_groups: int | None = None  # None: no more than there are channels
    shared: bool = True  # whether rows and columns have one convolution and one norm
    eps: float = 1e-5  # added to the variance of a group of channels

    def __post_init__(self) -> None:
        require(self.variant in VARIANTS, f"variant is one of {tuple(VARIANTS)}", variant=self.variant)
        require(self.kernel is None or self.kernel % 2 == 1, "the kernel is odd", kernel=self.kernel)
        for name in ("kernel", "groups", "norm_groups"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} >= 1", **{name: value})


def sizes(cfg: Config, width: int) -> tuple[int, int, int]:
    """(kernel, groups of the convolution, groups of the norm) for so many channels."""
    kernel, together, norms = VARIANTS[cfg.variant]
    groups = cfg.groups or max(width // together, 1)
    norms = cfg.norm_groups or min(norms, width)
    for name, count in (("groups", groups), ("norm_groups", norms)):
        require(width % count == 0, f"{name} part the channels evenly", channels=width, **{name: count})
    return cfg.kernel or kernel, groups, norms


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """The first of what has two is for profiles of rows, the last for those of columns."""
    c = dims["width"]
    kernel, groups, _ = sizes(cfg, c)
    own, fan = 1 if cfg.shared else 2, c // groups * kernel
    conv = torch.empty(own, c, c // groups, kernel).uniform_(-1, 1) * fan**-0.5
    return {"conv": conv, "norm": torch.ones(own, c), "norm_bias": torch.zeros(own, c)}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p = {name: t.double() for name, t in call.params.items()}
    image = x.double().mT.unflatten(2, call.sides)  # [B, C, rows, columns]
    a_h = slow_profile(image.mean(3), {name: t[0] for name, t in p.items()}, cfg)
    a_w = slow_profile(image.mean(2), {name: t[-1] for name, t in p.items()}, cfg)
    weighed = torch.einsum("bcij,bci,bcj->bcij", image, a_h, a_w)
    return weighed.flatten(2).mT.to(x.dtype), None


def slow_profile(z: Tensor, p: dict[str, Tensor], cfg: Config) -> Tensor:
    """σ(GN(conv1d(z))) of z [B, C, n], tap by tap; beyond its ends z is zero."""
    kernel, groups, norms = sizes(cfg, z.shape[1])
    reach = kernel // 2
    line = torch.cat([z.new_zeros(*z.shape[:2], reach), z, z.new_zeros(*z.shape[:2], reach)], dim=2)
    line, weight = (
        line.unflatten(1, (groups, -1)),
        p["conv"].unflatten(0, (groups, -1)),
    )  # [g, out, in, kernel]
    conv = torch.zeros_like(z).unflatten(1, (groups, -1))
    for t in range(kernel):
        conv = conv + torch.einsum("bgin,goi->bgon", line[..., t : t + z.shape[2]], weight[..., t])
    parts = conv.flatten(1, 2).unflatten(1, (norms, -1))  # [B, groups of the norm, C / groups, n]
    centred = parts - parts.mean((2, 3), keepdim=True)
    normed = centred / (centred.square().mean((2, 3), keepdim=True) + cfg.eps).sqrt()
    return (normed.flatten(1, 2) * p["norm"][:, None] + p["norm_bias"][:, None]).sigmoid()


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    image = as_image(at_least_float32(x), call.sides)
    a_h, a_w = (profile(image.mean(axis), call, which, cfg) for axis, which in ((3, 0), (2, -1)))
    return as_tokens(image * a_h[..., None] * a_w[:, :, None]).to(x.dtype), None


def profile(z: Tensor, call: Call, which: int, cfg: Config) -> Tensor:
    _, groups, norms = sizes(cfg, z.shape[1])
    conv, norm, bias = (call.params[name][which].to(z.dtype) for name in ("conv", "norm", "norm_bias"))
    z = F.conv1d(z, conv, padding=conv.shape[-1] // 2, groups=groups)
    # F.group_norm refuses a single number for each group
    return torch.group_norm(z, norms, norm, bias, cfg.eps).sigmoid()


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid),
    exempt={"residual": "y = x · a, x / 4 with weights of zero"},
    test_settings=(
        {"variant": "T", "norm_groups": 4},
        {"variant": "S", "norm_groups": 2, "shared": False},
        {"variant": "L", "norm_groups": 1},
        {"kernel": 3, "groups": 2, "norm_groups": 4, "shared": False},
    ),
    card=Card(
        title="ELA: efficient local attention",
        paper="ELA: Efficient Local Attention for Deep Convolutional Neural Networks (2024)",
        year=2024,
        idea="strips of rows and columns, convolved, normed by group and squashed, weigh the places of each channel",
        cost="O(N·C) time and O(C·k·(rows + columns)) for the profiles; k times 8 for S and L",
        state="none",
        needs=("cnn-features",),
        lineage=("softmax",),
        caveat=(
            "no released code was found. One convolution and one norm for rows and columns, without a bias, as common "
            "clones have it; the equations name two: shared=False. Kernels and groups of T, B, S and L are those "
            "of clones. Norm groups must part the channels; a layer of fewer channels than groups has one for each. "
            "It is not a layer of its own, but follows a convolution: no residual, and weights of zero give x / 4"
        ),
    ),
)
