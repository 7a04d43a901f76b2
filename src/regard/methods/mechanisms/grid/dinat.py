"""DiNA: each pixel attends to the k x k nearest pixels of its own residue modulo d, with a bias for every offset.

    ρ_j(i)   the j-th nearest neighbour of pixel i among those whose row and column are i's modulo d
    s_ij = q_i·k_ρ / √D + b(ρ_j(i), i)        b of [2k - 1, 2k - 1] for each head, by offset in steps of d
    o_i  = Σ_j softmax_j(s_ij) v_ρ            over the k² of them

With d = 1 it is NA, sharp and near; with d as large as an image allows, side / k, the same k² weights are spread over
all of it. Layers take turns between the two, so that a few of them let every pixel see every other. At a border the
window moves inwards within its residue and keeps k² pixels; their bias is that of where they are, not of the window's
middle.

Worked by hand, k = 3 and d = 2 on a 6 x 6 image whose values are numbered from 0, all scores equal: (0, 0) reads rows
and columns 0, 2, 4, mean 14, as does (2, 2); (1, 1) and (5, 3) read rows and columns 1, 3, 5, mean 21. On a 3 x 3 image
with d = 1 all read all; a bias of log 10 for two down and two right is met by the corner alone: (28 + 10·8) / 18 = 6,
where the others have 4.

>>> import math, torch
>>> q, v = torch.zeros(1, 1, 36, 1), torch.arange(36.0).view(1, 1, 36, 1)
>>> params, call = {"bias": torch.zeros(1, 5, 5)}, Call("self", grid=(6, 6))
>>> out = reference(q, q, v, Config(kernel=3, dilation=2), call.with_(params=params))[0].view(6, 6)
>>> out[[0, 2, 1, 5], [0, 2, 1, 3]].tolist()
[14.0, 14.0, 21.0, 21.0]
>>> params["bias"][0, 4, 4] = math.log(10)
>>> out = reference(q[:, :, :9], q[:, :, :9], v[:, :, :9], Config(3), Call("self", grid=(3, 3), params=params))[0]
>>> [round(x, 4) for x in out.flatten()[:3].tolist()]
[6.0, 4.0, 4.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import exact, heads_of
from regard.ops.grid import Axis, nearest_attention


@dataclass(frozen=True)
class Config:
    kernel: int = 7  # k, the pixel itself included
    dilation: int = 1  # d
    bias: bool = True  # params["bias"] [H, 2k - 1, 2k - 1]
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.kernel >= 1, "kernel >= 1", kernel=self.kernel)
        require(self.dilation >= 1, "dilation >= 1", dilation=self.dilation)


def fits(cfg: Config, sides: Sides) -> None:
    rule = "a dilated kernel fits into the image: kernel·dilation <= side"
    dilated = cfg.dilation > 1 and cfg.kernel > 1
    within = cfg.kernel * cfg.dilation <= min(sides)
    require(within or not dilated, rule, kernel=cfg.kernel, dilation=cfg.dilation, grid=sides)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    offsets = 2 * cfg.kernel - 1
    return {"bias": 0.02 * torch.randn(dims["heads"], offsets, offsets)} if cfg.bias else {}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    rows, columns = call.sides
    scale, out = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale, []
    for y, x in ((y, x) for y in range(rows) for x in range(columns)):
        near = [(a, b) for a in nearest(y, rows, cfg) for b in nearest(x, columns, cfg)]
        at = [a * columns + b for a, b in near]
        s = torch.einsum("bhd,bhjd->bhj", q_h[:, :, y * columns + x], k_h[:, :, at]) * scale
        if cfg.bias:
            down, right = ([(p - own) // cfg.dilation for p in line] for own, line in zip((y, x), zip(*near)))
            middle = cfg.kernel - 1  # of the table: no step
            learned = [
                call.params["bias"][:, middle + a, middle + b] for a, b in zip(down, right, strict=True)
            ]
            s = s + torch.stack(learned, dim=1).double()  # [H, k²]
        out.append(torch.einsum("bhj,bhje->bhe", s.softmax(-1), v_h[:, :, at]))
    return torch.stack(out, dim=2).to(v.dtype), None


def nearest(place: int, side: int, cfg: Config) -> list[int]:
    """The k places of an axis of the same residue that are nearest to this one; of the reference only."""
    residue = range(place % cfg.dilation, side, cfg.dilation)
    first = min(place // cfg.dilation - cfg.kernel // 2, len(residue) - cfg.kernel)
    return list(residue[max(first, 0) :][: cfg.kernel])


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    axes = [Axis(cfg.kernel, cfg.dilation)] * 2
    return nearest_attention(q, k, v, call.sides, axes, scale, call.params.get("bias")), None


REFUSED = "an image attends to itself, on all sides"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    order_aware=True,
    grid=OnGrid(fits, local=lambda cfg: ((cfg.kernel - 1) * cfg.dilation, 1)),
    test_settings=(
        {"kernel": 3},
        {"kernel": 2, "dilation": 2, "scale": 0.4},
        {"kernel": 5, "bias": False},
    ),
    card=Card(
        title="DiNA: dilated neighbourhood attention",
        paper="Dilated Neighborhood Attention Transformer, arXiv:2209.15001",
        year=2022,
        idea="k x k nearest pixels of the own residue modulo d: near and sparse layers take turns, at one cost",
        cost="O(N·k²·(D + E)) time, whatever the dilation",
        state="none",
        needs=("qkv", "vit"),
        lineage=("softmax", "fused_neighborhood_attention"),
        neutral={"kernel": 1 << 20, "bias": False},
        caveat=(
            "one dilation: a model sets it layer by layer, 1 and side // k in turns (DiNAT: k = 7, 8, 4, 2 and 1 on "
            "sides of 56, 28, 14 and 7). A dilated kernel must fit, k·d <= side; an undilated one that is longer than "
            "an axis is all of it, where the paper's code pads the image with zeros that are then read. Kernels of an "
            "even side, which that code refuses, have one more pixel above and to the left"
        ),
    ),
)
