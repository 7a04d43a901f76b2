"""HaloNet's local attention: the image in blocks of b x b, whose queries all read their block and a halo around it.

    W(i)  the rows and columns of i's block, h more on every side, as far as the image goes
    s_ij = q_i·(k_j + r_{y_j - y_i} + c_{x_j - x_i}) / √D        r, c learned, a vector for each step down and right
    o_i  = Σ_j softmax_j(s_ij) v_j                               over j in W(i)

A window of its own for each pixel would be k² keys that no other pixel reads. Blocks share theirs: (b + 2h)² keys for
b² queries, so that memory is that of a few copies of the image, and the products are of matrices. What is paid for it:
a pixel at the rim of its block sees h further on one side and b + h - 1 on the other, and an image that is moved by
less than a block is cut otherwise.

Worked by hand, b = 2 and h = 1 on a 4 x 4 image whose values are numbered from 0, all scores equal: the block of (0, 0)
reads rows and columns 0 to 2, mean 5; that of (3, 3) rows and columns 1 to 3, mean 10. If two steps down score log 3,
with q = 1 and scale 1, (0, 0) weighs row 2 three times: 4·(0 + 1 + 3·2)/5 + 1 = 6.6; (1, 0), in the same block, has no
row two steps below that it reads.

>>> import math, torch
>>> q, v = torch.ones(1, 1, 16, 1), torch.arange(16.0).view(1, 1, 16, 1)
>>> params = {"rows": torch.zeros(5, 1), "columns": torch.zeros(5, 1)}
>>> cfg, call = Config(block=2, halo=1, scale=1.0), Call("self", grid=(4, 4), params=params)
>>> out = reference(q, q, v, cfg, call)[0].flatten()
>>> [round(out[i].item(), 4) for i in (0, 4, 5, 15)]
[5.0, 5.0, 5.0, 10.0]
>>> params["rows"][4] = math.log(3)
>>> out = reference(q, q, v, cfg, call)[0].flatten()
>>> [round(out[i].item(), 4) for i in (0, 1, 4, 5)]
[6.6, 6.6, 5.0, 5.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, for_products, heads_of, per_query_head
from regard.ops.grid import from_windows, some_heads, window_places, windows


@dataclass(frozen=True)
class Config:
    block: int = 8  # b
    halo: int = 3  # h
    relative: bool = True  # params["rows"], params["columns"] [2 (b + h) - 1, D], the same for all heads
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.block >= 1, "block >= 1", block=self.block)
        require(self.halo >= 0, "halo >= 0", halo=self.halo)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    steps, key = 2 * (cfg.block + cfg.halo) - 1, dims["key"]
    names = ("rows", "columns") if cfg.relative else ()
    return {name: key**-0.5 * torch.randn(steps, key) for name in names}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    height, width = call.sides
    b, h = cfg.block, cfg.halo
    scale, out = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale, []
    for y, x in ((y, x) for y in range(height) for x in range(width)):
        top, left = y - y % b, x - x % b  # of the block
        down = range(max(0, top - h), min(height, top + b + h))
        right = range(max(0, left - h), min(width, left + b + h))
        at = [i * width + j for i in down for j in right]
        keys = k_h[:, :, at]
        if cfg.relative:
            r, c = (call.params[name].double() for name in ("rows", "columns"))
            zero = b + h - 1  # of the tables: no step
            keys = keys + torch.stack([r[zero + i - y] + c[zero + j - x] for i in down for j in right])
        s = torch.einsum("bhd,bhjd->bhj", q_h[:, :, y * width + x], keys) * scale
        out.append(torch.einsum("bhj,bhje->bhe", s.softmax(-1), v_h[:, :, at]))
    return torch.stack(out, dim=2).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    heads, tokens, dtype = q.shape[1], q.shape[2], v.dtype
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    blocks = [min(cfg.block, side) for side in call.sides]
    halos = [min(cfg.halo, side) for side in call.sides]
    own, read = places_of(call.sides, blocks, halos, q.device)
    q, k, v = for_products(*(per_query_head(t, heads).expand(-1, heads, -1, -1) for t in (q, k, v)))
    masked = at_least_float32(q.new_zeros(read.shape)).masked_fill(read < 0, -torch.inf)[:, None]  # [T, 1, W]
    outs = []
    for some in some_heads(q, k, v, read=(own.numel(), read.numel())):
        asked, keys, values = (windows(t, at) for t, at in zip(some, (own, read, read), strict=True))
        bias = masked + scale * of_steps(asked, call, cfg, blocks, halos) if cfg.relative else masked
        out = F.scaled_dot_product_attention(asked, keys, values, bias, scale=scale)  # [M, T, b², E]
        outs.append(from_windows(out, own, tokens))
    return torch.cat(outs).unflatten(0, (-1, heads)).to(dtype), None


def places_of(
    sides: Sides, blocks: list[int], halos: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """[T, b²] places of each block, [T, (b + 2h)²] those that it reads; the last block of an axis is filled up."""
    more = [-side % b for side, b in zip(sides, blocks, strict=True)]
    boxes = [b + 2 * h for b, h in zip(blocks, halos, strict=True)]
    around = [(h, h + m) for h, m in zip(halos, more, strict=True)]
    own = window_places(sides, blocks, blocks, [(0, m) for m in more], device)
    return own, window_places(sides, boxes, blocks, around, device)


def of_steps(asked: Tensor, call: Call, cfg: Config, blocks: list[int], halos: list[int]) -> Tensor:
    """[M, T, b², (b + 2h)²] products of queries with the vectors of the steps to the places that they read."""
    parts = []
    for axis, (b, h) in enumerate(zip(blocks, halos, strict=True)):
        table = call.params[("rows", "columns")[axis]].to(asked.dtype)
        products = at_least_float32(asked @ table.mT).unflatten(2, blocks)  # [M, T, b, b, steps]
        place = torch.arange(b, device=asked.device)[:, None]
        step = torch.arange(-h, b + h, device=asked.device) - place + cfg.block + cfg.halo - 1
        index = step[:, None] if axis == 0 else step
        parts.append(products.gather(-1, index.expand(*products.shape[:-1], -1)))
    down, right = parts
    return (down[..., :, None] + right[..., None, :]).flatten(4).flatten(2, 3)


def fits(cfg: Config, sides: Sides) -> None:
    """Any image: its last blocks are smaller where a side is no multiple of b."""


REFUSED = "an image attends to itself, block by block"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    order_aware=True,
    grid=OnGrid(fits, local=lambda cfg: (cfg.block + cfg.halo - 1, cfg.block)),
    test_settings=(
        {"block": 2, "halo": 1},
        {"block": 3, "halo": 2, "scale": 0.4},
        {"block": 4, "halo": 0},
        {"block": 1, "halo": 1, "relative": False},
    ),
    card=Card(
        title="HaloNet: blocked local attention",
        paper="Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv:2103.12731",
        year=2021,
        idea="b x b queries share the keys of their block and of a halo around it; scores know steps down and right",
        cost="O(N·(b + 2h)²·(D + E)) time; (b + 2h)²/b² copies of keys and values",
        state="none",
        needs=("qkv", "cnn-features"),
        lineage=("softmax",),
        neutral={"halo": 1 << 20, "relative": False},
        caveat=(
            "a halo beyond the image is masked: the paper leaves it open. Of two public versions (none is official) "
            "timm's keeps zero keys in the softmax, lucidrains' means to mask and has the mask inverted. Both terms of "
            "a score are scaled, as in lucidrains'; timm's scales the product of contents alone. Tables have the steps "
            "that occur, 2(b + h) - 1, not 2(b + 2h) - 1. A downsampling layer asks every second row and column: its "
            "outputs are those at these places. Sides that are no multiple of b end in smaller blocks, where both "
            "versions refuse them"
        ),
    ),
)
