"""Motion energy and attention between its places: what moves is sensed place by place, then pooled by who is alike.

    E_k  = |Σ_{y,x} Σ_a S_k(y, x) T_k(a) clip(t - a, y, x)|² + ε²
           S_k = e^{2πi f u} under a window, T_k = e^{(2πi φ - 1/τ) a}
    E'_k = κ E_k / (mean_k E_k + σ²)
    A_ij = exp(s cos(q_i, k_j)),   s = s_0 + s_1 σ(mean of q)         one s for each image
    o_i  = Σ_j A_ij v_j / √(Σ_m A_im · Σ_m A_mj)                      a graph, normalised on both sides

The first two lines are `motion_energy` and `normalised`: a complex filter is two real ones a quarter of a wave apart,
so that its squared size says how much moves along u at φ/f places a frame, and nothing of where in its wave it is. One
place sees only what moves across its edges (the aperture problem). The attention, which is the mechanism, lets places
join what they see: rows do not sum to one, since what many places ask is divided among them.

Worked by hand: s_0 = log 3, s_1 = 0, two tokens at right angles: A is 3 beside itself and 1 elsewhere, every sum is 4.

>>> import math
>>> q, v = torch.tensor([[5.0, 0.0], [0.0, 1.0]])[None, None], torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
>>> out = reference(q, q, v, Config(least=math.log(3), more=0.0), Call("self"))[0]
>>> [round(o, 4) for o in out.flatten().tolist()]
[5.0, 7.0]
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, exact, heads_of, matmul, mix, per_query_head, shown

TINY = 1e-12


@dataclass(frozen=True)
class Config:
    least: float = 1.0  # s_0
    more: float = 3 * math.pi  # s_1

    def __post_init__(self) -> None:
        require(min(self.least, self.more) >= 0, "least and more are at least 0", cfg=self)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    k, v, _ = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    there = torch.ones_like(k_h[..., :1])
    if call.key_mask is not None:
        there = there * call.key_mask[..., None]
    q_h = torch.where(there > 0, q_h, 0.0)
    count = there.sum((2, 3), keepdim=True).clamp(min=1) * q.shape[3]
    s = cfg.least + cfg.more / (1 + (-q_h.sum((2, 3), keepdim=True) / count).exp())
    one, other = (t / (t.square().sum(-1, keepdim=True) + TINY).sqrt() for t in (q_h, k_h))
    a = (s * torch.einsum("bhnd,bhmd->bhnm", one, other)).exp() * there * there.mT
    sums = a.sum(3, keepdim=True) * a.sum(2, keepdim=True)
    # a square root has no slope at zero
    root = sums.masked_fill(sums == 0, 1).sqrt()
    return (a / root @ v_h).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Scores by one product, less their largest: a factor of the graph is that of its sums."""
    k, v, _ = carried(k, v, call)
    q = at_least_float32(
        shown(q, None if call.key_mask is None else call.key_mask.expand(-1, q.shape[1], -1))
    )
    k = at_least_float32(per_query_head(k, q.shape[1]))
    seen = None if call.key_mask is None else call.key_mask[..., None].to(q.dtype)
    mean = q.mean((2, 3), keepdim=True) if seen is None else q.sum((2, 3), keepdim=True) / (
        seen.sum((2, 3), keepdim=True).clamp(min=1) * q.shape[3]
    )  # fmt: skip
    s = cfg.least + cfg.more * mean.sigmoid()
    one, other = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + TINY) for t in (q, k))
    a = (matmul(s * one, other.mT) - s).exp()  # [B, H, N, M]
    a = a if seen is None else a * (seen * seen.mT)
    rows, columns = (a.sum(axis, keepdim=True).clamp(min=TINY).rsqrt() for axis in (3, 2))
    return mix(a * rows * columns, v), None


def space_time(
    angle: Tensor, f: Tensor, phi: Tensor, *, spread: float = 2.5, decay: float = 6.0, reach: int = 7, frames: int = 6
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S [K, 2 reach + 1, 2 reach + 1] and T [K, frames], complex: units for f waves a place and φ waves a frame.

    A unit waits for what moves to `angle`, from x towards y. S has no mean, so that light alone is no motion.
    """
    y, x = torch.meshgrid(*2 * (torch.arange(-reach, reach + 1, dtype=angle.dtype),), indexing="ij")
    u = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    window = (-(x.square() + y.square()) / (2 * spread**2)).exp()
    space = torch.polar(window.expand_as(u), 2 * math.pi * f[:, None, None] * u)
    ages = torch.arange(frames, dtype=angle.dtype)
    time = torch.polar((-ages / decay).exp().expand(len(phi), -1), 2 * math.pi * phi[:, None] * ages)
    return space - space.mean((1, 2), keepdim=True), time


def motion_energy(
    clip: Tensor, space: Tensor, time: Tensor, *, stride: int = 1, spontaneous: float = 0.3
) -> Tensor:
    """E [B, K, rows, columns] of a clip [B, T, rows, columns], mean over all its ends; zero stands off the image.

    At every `stride`-th place of both axes, from the first on.

    >>> units = torch.tensor([0.0, math.pi]), torch.tensor([0.2, 0.2]), torch.tensor([0.25, 0.25])
    >>> x, t = torch.arange(31.0), torch.arange(6.0)
    >>> clip = torch.cos(2 * math.pi * (0.2 * x - 0.25 * t[:, None]))[None, :, None].expand(1, 6, 31, 31)
    >>> right, left = motion_energy(clip, *space_time(*units))[0, :, 15, 15].tolist()
    >>> right > 20 * left
    True
    """
    weight = torch.view_as_real(space).permute(3, 0, 1, 2).flatten(0, 1)[:, None]
    seen = F.conv2d(clip.flatten(0, 1)[:, None], weight, stride=stride, padding=space.shape[1] // 2)
    real, imaginary = (
        seen.unflatten(0, clip.shape[:2]).unflatten(2, (2, -1)).unbind(2)
    )  # [B, T, K, rows, columns]
    ages, ends = time.shape[1], range(time.shape[1] - 1, clip.shape[1])
    steps = [torch.complex(real, imaginary)[:, end - ages + 1 : end + 1].flip(1) for end in ends]
    sizes = [torch.einsum("btkyx,kt->bkyx", part, time).abs().square() for part in steps]
    return torch.stack(sizes).mean(0) + spontaneous**2


def normalised(energy: Tensor, gain: float = 4.0, sigma: float = 0.2) -> Tensor:
    """E' of [B, K, ...]: each unit over the mean of all at its place.

    >>> normalised(torch.tensor([[1.0, 3.0]]), sigma=0.0)
    tensor([[2., 6.]])
    """
    return gain * energy / (energy.mean(1, keepdim=True) + sigma**2)


def mean_of_values(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    k, v, _ = carried(k, v, call)
    v = heads_of(v, q.shape[1])
    count = (
        v.new_tensor(v.shape[2])
        if call.key_mask is None
        else call.key_mask.sum(2)[..., None, None].clamp(min=1)
    )
    return (v.sum(2, keepdim=True) / count).expand(-1, -1, q.shape[2], -1)


REFUSED = "what asks a place divides it among those that ask: places of one image, all at once"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    neutral_base=mean_of_values,
    test_settings=({"least": 0.3, "more": 2.0},),
    exempt={"queries": "columns are divided by their sums over all queries, and s is a mean of them"},
    card=Card(
        title="Motion energy sensing and self-attention between places",
        paper=(
            "Modelling Human Visual Motion Processing with Trainable Motion Energy Sensing and a Self-attention "
            "Network (2023)"
        ),
        year=2023,
        idea="filters in quadrature sense motion; a graph of cosines, normalised on both sides, pools it",
        cost="O(N²·(D + E)) time and N² weights; the filters O(T·N·K·w²) for K units of w x w places",
        state="none: whole images at once",
        needs=("qkv", "video-frames"),
        lineage=("motion energy (Adelson and Bergen, 1985)", "softmax"),
        neutral={"least": 0.0, "more": 0.0},
        caveat=(
            "the mechanism is one step of the second stage's attention; the first stage stands beside it as functions "
            "with set filters. No code of the paper was found; the form is that of its authors' later model: q "
            "and k there are one projection of two layers, values and features are updated by convolutional GRUs over "
            "six such steps, 256 units on eight scales are learned, and a decoder reads the flow. Here q and k "
            "are the caller's, and may differ. Its division by the largest weight cancels and is left out. Windows "
            "of the filters are round, their spread and decay ours"
        ),
    ),
)
