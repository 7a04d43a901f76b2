"""Neighbourhood attention: each place of a line, an image or a clip attends to its nearest places on every axis.

    N(i) = N_1(i_1) x N_2(i_2) x ...          on each axis the w places of i's residue modulo d nearest to i
    o_i  = Σ_j softmax_j(q_i·k_j / √D) v_j    over j in N(i)

At a border the window moves inwards instead of being cut, so every query has w keys on each axis: that is what sets
it apart from a window that slides over padding. With stride s, s neighbours share the window of the one in their
middle; on a causal axis a place reads the w places up to its own, and fewer where the axis begins.

The paper's point is how to compute it: not query by query, but a tile of queries over the box of keys that any of them
reads, with a mask inside. So `fast` does it here, by one fused call for all tiles.

Worked by hand, w = 3 on a 5 x 5 image: the corner (0, 0) reads rows and columns 0 to 2, as does (1, 1); (2, 2) reads
1 to 3; (4, 2) reads rows 2 to 4 and columns 1 to 3. With all scores equal an output is the mean of the nine values,
here numbered from 0: 6, 6, 12, 17.

>>> import torch
>>> q, v = torch.zeros(1, 1, 25, 1), torch.arange(25.0).view(1, 1, 25, 1)
>>> out = reference(q, q, v, Config(window=3), Call("self", grid=(5, 5)))[0]
>>> out.view(5, 5)[[0, 1, 2, 4], [0, 1, 2, 2]].tolist()
[6.0, 6.0, 12.0, 17.0]
"""

from dataclasses import dataclass

import torch

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import exact, heads_of
from regard.ops.grid import Axis, boxes, check_axes, nearest_attention

PerAxis = int | tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """A number is that of every axis, a tuple has one for each."""

    window: PerAxis = 7  # w, the place itself included
    dilation: PerAxis = 1  # d
    stride: PerAxis = 1  # s
    causal: bool | tuple[bool, ...] = False  # whether a place reads none after it on the axis
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        for count in {len(x) for x in vars(self).values() if isinstance(x, tuple)} or {1}:
            axes_of(self, count)


def axes_of(cfg: Config, count: int) -> list[Axis]:
    """The settings axis by axis."""
    given = {name: getattr(cfg, name) for name in ("window", "dilation", "stride", "causal")}
    for name, value in given.items():
        fits = not isinstance(value, tuple) or len(value) == count
        require(fits, "a number for every axis, or one for each", axes=count, **{name: value})
    columns = [value if isinstance(value, tuple) else (value,) * count for value in given.values()]
    return [Axis(*column) for column in zip(*columns, strict=True)]


def fits(cfg: Config, sides: Sides) -> None:
    check_axes(axes_of(cfg, len(sides)), sides)


def local(cfg: Config) -> tuple[int, int] | None:
    """No place further away than a window that has moved inwards; with a stride windows begin with the image."""
    axes = axes_of(cfg, 2)
    alike = all(axis.stride == 1 for axis in axes)
    return (max((axis.window - 1) * axis.dilation for axis in axes), 1) if alike else None


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    scale, out = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale, []
    given = (cfg.window, cfg.dilation, cfg.stride, cfg.causal)
    axes = [Axis(*(x[i] if isinstance(x, tuple) else x for x in given)) for i in range(len(call.sides))]
    for i, near in enumerate(boxes(call.sides, axes)):
        s = (k_h[:, :, near] @ q_h[:, :, i, :, None])[..., 0] * scale  # [B, H, |N(i)|]
        out.append((s.softmax(-1)[..., None] * v_h[:, :, near]).sum(2))
    return torch.stack(out, dim=2).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    return nearest_attention(q, k, v, call.sides, axes_of(cfg, len(call.sides)), scale), None


REFUSED = "a grid attends to itself; an axis may be causal: causal=True"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    grid=OnGrid(fits, axes=(1, 2, 3), local=local),
    test_settings=(
        {"window": 3},
        {"window": (3, 4), "dilation": (2, 1)},
        {"window": (5, 3), "stride": (3, 2)},
        {"window": 3, "causal": (True, False), "scale": 0.4},
        {"window": 4, "stride": 2, "causal": (False, True), "dilation": 2},
    ),
    card=Card(
        title="Neighbourhood attention, in tiles (Faster Neighborhood Attention)",
        paper=(
            "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level "
            "(2024)"
        ),
        year=2024,
        idea="each place attends to its w nearest places on every axis; tiles of queries share a box of keys",
        cost="O(N·wᵃ·(D + E)) time for a axes, and as many scores as the boxes of all tiles have",
        state="none",
        needs=("qkv", "vit"),
        lineage=("softmax",),
        neutral={"window": 1 << 20},
        caveat=(
            "borders as in NATTEN: windows move inwards, within the residue of a dilation too, and even windows have "
            "one more key on the left; a causal axis does shrink where it begins. A window longer than its axis is the "
            "axis, where NATTEN refuses it. Strides are those of its later versions (the paper has none). The paper's "
            "GPU kernels are not here, nor their percentages"
        ),
    ),
)
