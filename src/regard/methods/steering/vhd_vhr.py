"""VHD and VHR: the heads whose output changes most where the image is gone are made louder.

    VHD_i = |z_i - z'_i|                     z_i a head's output at the newest token, z'_i without the image
    VHD_i = 0    where  VHD_i > μ + σ  and  |z'_i|² > μ' + σ'     head loud because the image is gone
    z_i ← α z_i  where  VHD_i > median(VHD)                       before the projection, in some layers

μ, σ and the median are over the heads of a layer, μ' and σ' of |z'|².

Heads are chosen at the prompt's last token, layer by layer: z of a layer is what the louder heads of the layers before
it make of it. They stay the same for every token that is generated.

>>> import torch
>>> z = torch.tensor([[-2.0, 8.0, 7.0, 1.0]])[..., None]  # four heads of width 1
>>> without = torch.tensor([[6.0, 5.0, 5.0, 0.0]])[..., None]  # VHD 8 > 3.5 + 2.7, and 36 > 21.5 + 13.2
>>> vhd, louder = measure(z[:, :, None], without, Config())
>>> vhd, louder.flatten()
(tensor([[0., 3., 2., 1.]]), tensor([-2., 16., 14.,  1.]))
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered, Stream


@dataclass(frozen=True)
class Config:
    strength: float = 2.0  # α
    last: int = 14  # so many of the last layers; all, where a model has fewer. InstructBLIP: 18
    second: bool = True  # the second layer as well
    outliers: bool = True  # whether heads that are loud because the image is gone count as indifferent
    hides: str = "image"  # the role that is taken away

    def __post_init__(self) -> None:
        require(self.strength > 0, "strength > 0", strength=self.strength)
        require(self.last >= 0, "last >= 0", last=self.last)
        require(self.last or self.second, "a layer or more", last=self.last, second=self.second)
        require(self.hides, "a role to hide", hides=self.hides)


def acts(at: Steered, cfg: Config) -> bool:
    return at.layer >= at.layers - cfg.last or (cfg.second and at.layer == 1)


def high(x: Tensor) -> Tensor:
    """[B, H] where a head lies more than a standard deviation above the mean of its layer."""
    return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)


def divergence(z: Tensor, without: Tensor, outliers: bool = True) -> Tensor:
    """[B, H] VHD of heads' outputs z, without [B, H, E]; zero for outliers, where they count as such."""
    z, without = at_least_float32(z), at_least_float32(without)
    vhd = (z - without).norm(dim=-1)
    if not outliers:
        return vhd
    return vhd.masked_fill(high(vhd) & high(without.square().sum(-1)), 0)


def factors(vhd: Tensor, strength: float) -> Tensor:
    """[B, H, 1, 1] what each head's output is multiplied by."""
    chosen = vhd > vhd.median(-1, keepdim=True).values
    return torch.where(chosen, strength, 1.0).to(vhd.dtype)[..., None, None]


def louder(z: Tensor, factor: Tensor) -> Tensor:
    return (z * factor).to(z.dtype)


def measure(z: Tensor, without: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """VHD [B, H], and z [B, H, R, E] with the heads made louder that are chosen by its last row."""
    vhd = divergence(z[:, :, -1], without, cfg.outliers)
    return vhd, louder(z, factors(vhd, cfg.strength))


def streams(cfg: Config) -> tuple[Stream, ...]:
    return (Stream("without", hide=cfg.hides, records=("z",), once=True),)


def prepare(runs: Any, at: Steered, cfg: Config) -> Tensor:
    """[B, layers, H, E] the heads' outputs at the last token without the image."""
    return runs["without"]["z"].transpose(0, 1)


def steer(at: Steered, z: Tensor, cfg: Config) -> Tensor:
    if at.phase == "prefill":
        vhd = divergence(z[:, :, -1], at.memory[:, at.layer].to(z.device), cfg.outliers)
        at.notes["factor"] = factors(vhd, cfg.strength)
    return louder(z, at.notes["factor"])


def reference(z: Tensor, without: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """By the definition: text by text and head by head, on Python's numbers."""
    scores, result = [], z.tolist()
    for text, gone in zip(result, without.tolist(), strict=True):
        vhd = [math.dist(head[-1], other) for head, other in zip(text, gone, strict=True)]
        size = [math.fsum(x * x for x in other) for other in gone]
        limits = [fmean(x) + pstdev(x) for x in (vhd, size)]
        for i, pair in enumerate(zip(list(vhd), size, strict=True)):
            if cfg.outliers and pair[0] > limits[0] and pair[1] > limits[1]:
                vhd[i] = 0.0
        for i, head in enumerate(text):
            if vhd[i] > median(vhd):
                text[i] = [[cfg.strength * x for x in row] for row in head]
        scores.append(vhd)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(result, dtype=torch.float64)


def cases(seed: int) -> Iterable[tuple]:
    """Even and odd numbers of heads, one head, equal heads, an outlier of both kinds, several rows, float32, α = 1."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        batch: int, heads: int, rows: int, width: int, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        shapes = (batch, heads, rows, width), (batch, heads, width)
        return [torch.randn(*s, generator=g, dtype=dtype) for s in shapes]

    yield *drawn(3, 8, 1, 4), Config()
    yield *drawn(2, 5, 3, 2), Config(strength=0.5)
    yield *drawn(2, 6, 1, 3, torch.float32), Config()
    yield *drawn(1, 1, 1, 2), Config()
    yield *drawn(2, 4, 1, 3), Config(strength=1.0)
    z, without = drawn(2, 8, 1, 4)
    without[:, 2] += 9  # louder without the image
    z[:, 5] += 7  # louder with it
    z[:, 6], z[:, 7] = z[:, 0], z[:, 1]
    without[:, 6], without[:, 7] = without[:, 0], without[:, 1]
    yield z, without, Config()
    yield z, without, Config(outliers=False)
    # high among squares by a whole population's σ alone
    without = torch.tensor([[6, 5, 5, 0]], dtype=torch.float64)[..., None]
    yield without[:, :, None] + torch.tensor([8.0, 3, 2, 1])[:, None, None], without, Config()


METHOD = SteeringPage(
    config=Config,
    acts=acts,
    z=steer,
    rows="last",
    streams=streams,
    prepare=prepare,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"last": 1},),
    card=Card(
        title="VHD and VHR",
        paper="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        year=2025,
        idea="the half of the heads whose output depends most on the image is scaled up before the projection",
        cost="a pass of the prompt without the image; nothing while tokens are generated",
        needs=("decoder-lm", "an image, or a span with a role"),
        neutral={"strength": 1.0},
        caveat="no code was found. The paper drops the image's tokens from the second run; here they are hidden, and "
        "the others keep their positions. That run is the plain model's: whether the paper scales heads in it as "
        "well it does not say. σ is the standard deviation over all heads, not a sample's",
    ),
)
