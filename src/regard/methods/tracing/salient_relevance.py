"""Salient Relevance: which areas of an image a CNN read its class from, by relevance that is then seen as an image.

    1  R = logit of the class, layer by layer back to the pixels    R_i = Σ_j x_i w_ij / z_j R_j
       convolution, pooling  z_j = Σ_i x_i w_ij + b_j                max pooling: to the largest of each window
       linear                z_j = Σ_i x_i w_ij⁺, and w⁺ for w       weights above 0 alone; ReLU passes R on
    2  d(p, q) = |p - q| / (1 + c |place p - place q|)               patches of the map m = R⁺ / max |R|
       s_p = 1 - exp(-mean of d(p, q) over the K least ones)         what differs from what is like it the most
       S_p = mean over scales of s_p (1 - distance to the nearest focus),   foci: s > 0.8 of the largest s

where |p - q| is the root mean square over a patch's pixels, places are divided by the longer side, and a scale is the
map in so much of its size. Relevance alone lights single pixels; a patch stands out where its surroundings differ from
the rest, so that what is close together becomes an area. Without biases Σ_i R_i is the logit.

One linear layer, x = (1, 2, 1), w = (3, 1, -1): the logit 4 goes to the first two as 3 : 2.

>>> net = nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False))
>>> net[1].weight.data = torch.tensor([[3.0, 1.0, -1.0]])
>>> x = torch.tensor([[[[1.0, 2.0, 1.0]]]])
>>> [round(r, 4) for r in relevance(net, x, torch.tensor([0])).flatten().tolist()]
[2.4, 1.6, 0.0]
>>> [round(r, 4) for r in relevance(net, x, torch.tensor([0]), positive=False).flatten().tolist()]
[3.0, 2.0, -1.0]

Of a row 1, 0, 0 the first pixel is at 1 / (1 + 3/3) and 1 / (1 + 6/3) of the others: 1 - exp(-(1/2 + 1/3) / 2).

>>> from math import exp
>>> round(single(torch.tensor([[[1.0, 0.0, 0.0]]]), Config(patch=1))[0, 0, 0].item() - 1 + exp(-5 / 12), 4)
0.0
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.tracing import TracingPage
from regard.ops.regions import shrunk, stretched
from regard.ops.relevance import PASSED, relevance, shared_out
from regard.ops.saliency import compared, focused


@dataclass(frozen=True)
class Config:
    linear: Literal["positive", "all"] = "positive"  # weights of linear layers that pass relevance on
    eps: float = 1e-9  # added to each z, away from 0
    signed: bool = False  # whether the map also has what speaks against the class
    patch: int = 7  # pixels of a patch, each way
    similar: int = 64  # K
    distance: float = 3.0  # c
    # sizes of the map that patches are compared at, as shares of its own
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)
    focus: float = 0.8  # share of the largest s above which a place is a focus

    def __post_init__(self) -> None:
        require(self.linear in ("positive", "all"), "linear is positive or all", linear=self.linear)
        require(
            self.eps >= 0 and self.distance >= 0, "eps, distance >= 0", eps=self.eps, distance=self.distance
        )
        require(self.patch >= 1 and self.patch % 2 == 1, "patch is odd", patch=self.patch)
        require(self.similar >= 1, "similar >= 1", similar=self.similar)
        ok = bool(self.scales) and all(0 < s <= 1 for s in self.scales)
        require(ok, "scales in (0, 1], one or more", scales=self.scales)
        require(0 <= self.focus < 1, "0 <= focus < 1", focus=self.focus)


@dataclass(frozen=True)
class SalientRelevance:
    relevance: Tensor  # [B, H, W] of pixels, all channels together
    areas: Tensor  # [B, H, W] in [0, 1)


EXACT = "donot_use_mm_for_euclid_dist"


def apart(m: Tensor) -> Tensor:
    """[N, N] distances of the places of maps [B, H, W], in longer sides."""
    high, wide = m.shape[1:]
    rows = torch.arange(high, device=m.device).repeat_interleave(wide)
    places = torch.stack([rows, torch.arange(wide, device=m.device).repeat(high)], -1).to(m) / max(high, wide)
    return torch.cdist(places, places, compute_mode=EXACT)


def single(m: Tensor, cfg: Config) -> Tensor:
    """[B, H, W] how much each patch of maps [B, H, W] differs from the K that are the most like it."""
    high, wide = m.shape[1:]
    if high * wide == 1:
        return torch.zeros_like(m)
    half = cfg.patch // 2
    padded = F.pad(m[:, None], (half,) * 4, mode="replicate")
    p = F.unfold(padded, cfg.patch).mT  # [B, N, patch²]
    d = torch.cdist(p, p, compute_mode=EXACT) / cfg.patch / (1 + cfg.distance * apart(m))
    own = torch.eye(high * wide, dtype=torch.bool, device=m.device)
    least = d.masked_fill(own, torch.inf).topk(min(cfg.similar, high * wide - 1), largest=False).values
    return (1 - (-least.mean(-1)).exp()).view_as(m)


def towards_foci(s: Tensor, cfg: Config) -> Tensor:
    """s [B, H, W] less where the nearest place above `focus` of the largest is far."""
    s = s / s.amax((1, 2), keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    nearest = (
        apart(s).expand(len(s), -1, -1).masked_fill((s <= cfg.focus).flatten(1)[:, None], torch.inf).amin(-1)
    )
    return s * (1 - nearest.clamp(max=1)).view_as(s)


def areas(r: Tensor, cfg: Config) -> Tensor:
    """[B, H, W] context-aware saliency of relevance [B, H, W]."""
    most = r.abs().amax((1, 2), keepdim=True)
    m, found = (r if cfg.signed else r.clamp(min=0)) / most.clamp(min=torch.finfo(r.dtype).tiny), []
    for scale in cfg.scales:
        size = [max(1, round(scale * n)) for n in r.shape[1:]]
        s = towards_foci(single(F.adaptive_avg_pool2d(m, size), cfg), cfg)
        found.append(F.interpolate(s[:, None], r.shape[1:], mode="bilinear")[:, 0])
    return torch.stack(found).mean(0)


def measure(
    net: nn.Sequential, images: Tensor, classes: Tensor, cfg: Config | None = None
) -> SalientRelevance:
    """Of images [B, C, H, W], each for its class [B]."""
    cfg = cfg or Config()
    r = relevance(net, images, classes, cfg.linear == "positive", cfg.eps).sum(1)
    return SalientRelevance(r, areas(r, cfg))


def reference(
    net: nn.Sequential, images: Tensor, classes: Tensor, cfg: Config | None = None
) -> SalientRelevance:
    """An image at a time: every layer as the matrix that it is there, every patch beside every other."""
    cfg, net, found, maps = cfg or Config(), deepcopy(net).double().requires_grad_(False), [], []
    layers = [layer for layer in net.modules() if not isinstance(layer, nn.Sequential)]
    for image, label in zip(images.double(), classes.tolist(), strict=True):
        xs = [image]
        for layer in layers:
            xs.append(layer(xs[-1][None])[0])
        r = torch.zeros_like(xs[-1])
        r[label] = xs.pop()[label]
        for layer, x in zip(reversed(layers), reversed(xs), strict=True):
            r = (
                r
                if isinstance(layer, PASSED)
                else shared_out(layer, x, r.flatten(), cfg.linear == "positive", cfg.eps)
            )
        found.append(r.view_as(image).sum(0))
        maps.append(seen_as_an_image(found[-1].tolist(), cfg))
    return SalientRelevance(torch.stack(found), torch.tensor(maps, dtype=torch.float64))


def seen_as_an_image(r: list[list[float]], cfg: Config) -> list[list[float]]:
    high, wide = len(r), len(r[0])
    most = max(abs(n) for row in r for n in row) or 1.0
    m = [[(n if cfg.signed else max(n, 0.0)) / most for n in row] for row in r]
    total = [[0.0] * wide for _ in r]
    for scale in cfg.scales:
        size = max(1, round(scale * high)), max(1, round(scale * wide))
        s = stretched(
            focused(compared(shrunk(m, *size), cfg.patch, cfg.similar, cfg.distance), cfg.focus), high, wide
        )
        total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(total, s, strict=True)]
    return [[n / len(cfg.scales) for n in row] for row in total]


def cases(seed: int) -> Iterable[tuple]:
    """With and without biases; both rules; strides; means; one channel and several; no relevance at all; few places."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        net = nn.Sequential(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)), nn.Flatten())
        net.extend([nn.Linear(27, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)])
        biased = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        biased.append(nn.Linear(2, 2))
        biased[-1].weight.data.abs_()  # type: ignore[operator]
        biased[0].bias.data.abs_()  # type: ignore[operator]
        images = torch.rand(2, 2, 6, 6, dtype=torch.float64)
        row = torch.rand(1, 1, 7, 8, dtype=torch.float64)
    net, biased, few = net.double(), biased.double(), Config(patch=3, similar=5, scales=(1.0, 0.5))
    yield net, images, torch.tensor([0, 2]), few
    yield (
        net,
        images[:1],
        torch.tensor([1]),
        Config(linear="all", signed=True, patch=1, distance=0.0, focus=0.5),
    )
    yield biased, row, torch.tensor([1]), Config(patch=3, eps=0.01)
    yield biased, torch.zeros_like(row), torch.tensor([0]), Config(linear="all", eps=0.0, scales=(0.1,))


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="Salient Relevance",
        paper="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise "
        "relevance propagation (arXiv:1712.08268)",
        year=2017,
        idea="relevance of pixels for a class, looked at as an image: what stands out there is what the CNN looked at",
        cost="a forward and a backward pass; at each scale all N patches beside all N others",
        needs=("cnn-features",),
        lineage=("layer-wise relevance propagation", "context-aware saliency"),
        caveat="for CNNs of layers one after the other, not for language models: it has no observer and no score. "
        "The rules are those of the released code (positive weights in linear layers, their biases left out; plain "
        "elsewhere, where biases keep relevance for themselves; a unit that only weights below 0 reach loses "
        "its own); there eps is added to z, here away from 0. The "
        "saliency step is not in the cells of it that were read: it is that of context-aware saliency, patches of one "
        "scale beside each other only, no prior of the centre. Patch, K, scales and that the map is what speaks for "
        "the class are set here",
    ),
)
