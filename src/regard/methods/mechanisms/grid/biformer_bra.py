"""Bi-level routing attention: each region of an image reads the few regions that it is nearest to, token by token.

    q̄_r, k̄_r = means of q and k over region r, all heads together       S x S regions
    I_r = the k regions s with the largest q̄_r·k̄_s                      ties, in float32, go to the first
    o_i = Σ_j softmax_j(q_i·k_j / √(H·D)) v_j + LCE(v)_i                 over j in the regions I_r, i in r

The choice is made between S² regions, so it is cheap; what follows is dense attention of p = N/S² queries to k·p keys,
one fused call for all regions of some heads. All heads read the same regions. The choice carries no gradient. LCE
convolves each channel of v with its own kernel, on the image.

Worked by hand, four regions of one place: q = 1, -1, 1, 1 and k = 1, 3, 3, 0. With k = 1 the second place reads the
last key, the others the second, which ties with the third: values 10, 20, 30, 40 give 20, 40, 20, 20. A kernel of
one tap, 0.5, adds half of each place's own value.

>>> q, k, v = (torch.tensor(x).view(1, 1, 4, 1) for x in ([1.0, -1, 1, 1], [1.0, 3, 3, 0], [10.0, 20, 30, 40]))
>>> kernel = {"lce": torch.tensor(0.5).view(1, 1, 1, 1), "lce_bias": torch.zeros(1, 1)}
>>> out, _ = reference(q, k, v, Config(regions=2, top_k=1, lce=1), Call("self", grid=(2, 2), params=kernel))
>>> out.flatten().tolist()
[25.0, 50.0, 35.0, 40.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, explicit, for_products, heads_of, per_query_head
from regard.ops.grid import from_regions, to_regions

GATHERED = 1 << 22  # numbers of keys and values gathered at once: changes the speed and the memory only


@dataclass(frozen=True)
class Config:
    regions: int = 7  # S, on each axis
    top_k: int | None = 4  # regions that each region reads; None: all
    lce: int = 5  # taps of the convolution of v on each axis, an odd number; 0: none
    scale: float | None = None  # None: (H * D) ** -0.5, the width of all heads

    def __post_init__(self) -> None:
        require(self.regions >= 1, "regions >= 1", regions=self.regions)
        rule = "1 <= top_k <= regions², or None for all"
        require(self.top_k is None or 1 <= self.top_k <= self.regions**2, rule, cfg=self)
        odd = self.lce == 0 or (self.lce > 0 and self.lce % 2 == 1)
        require(odd, "an odd number of taps, or 0", lce=self.lce)

    @property
    def read(self) -> int:
        return self.regions**2 if self.top_k is None else self.top_k


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """The kernels and biases of LCE, as torch draws those of a convolution."""
    if cfg.lce == 0:
        return {}
    heads, value = dims["kv_heads"], dims["value"]
    kernel, bias = (2 * torch.rand(heads, value, *taps) - 1 for taps in ((cfg.lce, cfg.lce), ()))
    return {"lce": kernel / cfg.lce, "lce_bias": bias / cfg.lce}


def fits(cfg: Config, sides: Sides) -> None:
    rule = "regions divide the sides of the grid"
    require(all(side % cfg.regions == 0 for side in sides), rule, regions=cfg.regions, sides=sides)


def scale_of(q: Q, cfg: Config) -> float:
    return (q.shape[1] * q.shape[3]) ** -0.5 if cfg.scale is None else cfg.scale


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Image by image, the places of each region by their numbers."""
    heads, own = q.shape[1], region_places(call.sides, cfg.regions)  # own [S²][p]
    scale = (heads * q.shape[3]) ** -0.5 if cfg.scale is None else cfg.scale
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    out = torch.zeros_like(q_h[..., :1] * v_h)
    for b in range(len(q)):
        means = (t[b].detach()[:, own].mean(2) for t in (q_h, k_h))  # [H, S², D]
        scores = torch.einsum("hrd,hsd->rs", *means).float().tolist()
        chosen = [sorted(range(len(own)), key=lambda s: -row[s])[: cfg.read] for row in scores]
        near = [[j for s in regions for j in own[s]] for regions in chosen]  # [S²][k·p]
        a = torch.einsum("hrid,hrjd->hrij", q_h[b][:, own], k_h[b][:, near]) * scale
        out[b, :, own] = a.softmax(-1) @ v_h[b][:, near]
    return (out + taps(v_h, cfg, call)).to(v.dtype), None


def region_places(sides: Sides, s: int) -> list[list[int]]:
    """The places of each region, both counted row by row."""
    high, wide = sides[0] // s, sides[1] // s
    corners = [(high * a, wide * b) for a in range(s) for b in range(s)]
    return [[(y + i) * sides[1] + x + j for i in range(high) for j in range(wide)] for y, x in corners]


def taps(v: V, cfg: Config, call: Call) -> Tensor | float:
    """LCE as a sum over the taps around each place of an image with zeros around it."""
    if cfg.lce == 0:
        return 0.0
    kernel, bias = (heads_of(call.params[name][None].double(), v.shape[1])[0] for name in ("lce", "lce_bias"))
    image = F.pad(v.unflatten(2, call.sides), (0, 0, *4 * (cfg.lce // 2,)))  # [B, H, y, x, E]
    around = image.unfold(2, cfg.lce, 1).unfold(3, cfg.lce, 1)  # [B, H, y, x, E, lce, lce]
    return (torch.einsum("bhyxeij,heij->bhyxe", around, kernel) + bias[:, None, None]).flatten(2, 3)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    heads, dtype, scale = q.shape[1], v.dtype, scale_of(q, cfg)
    local = per_query_head(convolved(v, call), heads) if cfg.lce else None
    q, k, v = (per_query_head(t, heads).expand(-1, heads, -1, -1) for t in for_products(q, k, v))
    if cfg.read == cfg.regions**2:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = routed(q, k, v, cfg.regions, cfg.read, call.sides, scale)
    return (out if local is None else out + local).to(dtype), None


def routed(q: Q, k: K, v: V, s: int, read: int, sides: Sides, scale: float) -> Out:
    """Each of s x s regions attends to those that it chooses; some heads at a time."""
    size = sides[0] // s, sides[1] // s
    parts = tuple(to_regions(t, sides, size) for t in (q, k, v))  # [B, H, S², p, D]
    chosen = routes(parts[0], parts[1], read).repeat_interleave(q.shape[1], 0)  # [B·H, S², read]
    q, k, v = (t.flatten(0, 1) for t in parts)
    numbers = chosen[:1].numel() * k.shape[2] * (k.shape[3] + v.shape[3])  # gathered for one head
    rows = max(1, GATHERED // max(1, numbers))
    outs = []
    for q_r, k_r, v_r, at in zip(*(t.split(rows) for t in (q, k, v, chosen)), strict=True):
        outs.append(F.scaled_dot_product_attention(q_r, gathered(k_r, at), gathered(v_r, at), scale=scale))
    return from_regions(torch.cat(outs), sides, size).unflatten(0, parts[0].shape[:2])


def routes(q: Tensor, k: Tensor, read: int) -> Tensor:
    """[B, S², read]: the regions that each region reads, of q and k in regions."""
    q, k = (t.detach().mean(3, dtype=at_least_float32(t[:0]).dtype).double() for t in (q, k))
    scores = q.transpose(1, 2).flatten(2) @ k.transpose(1, 2).flatten(2).mT
    # a product adds up the same numbers in several orders: in float32 what ties does tie
    return scores.float().argsort(dim=-1, descending=True, stable=True)[..., :read]


def gathered(x: Tensor, chosen: Tensor) -> Tensor:
    """[r, S², read·p, D] of regions [r, S², p, D]; as an embedding, whose gradient is quick."""
    first = torch.arange(len(x), device=x.device).view(-1, 1, 1) * x.shape[1]
    rows = F.embedding(first + chosen, x.flatten(2).flatten(0, 1))
    return rows.flatten(2).unflatten(2, (-1, x.shape[3]))


def convolved(v: V, call: Call) -> Tensor:
    """[B, G, N, E]: each channel of v by its own kernel, on the image."""
    image = at_least_float32(v).mT.flatten(1, 2).unflatten(2, call.sides)  # [B, G·E, y, x]
    kernel, bias = (call.params[name].flatten(0, 1).to(image.dtype) for name in ("lce", "lce_bias"))
    image = F.conv2d(image, kernel[:, None], bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
    return image.flatten(2).unflatten(1, v.shape[1::2]).mT


def all_tokens(q: Q, k: K, v: V, call: Call) -> Out:
    return explicit(q, k, v, scale=scale_of(q, Config()))


REFUSED = "a region's mean is over all of its tokens: an image attends to itself, whole"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    grid=OnGrid(fits, permutes=lambda cfg: cfg.read == cfg.regions**2 and cfg.lce == 0),
    test_settings=(
        {"regions": 2, "top_k": 1, "lce": 0},
        {"regions": 2, "top_k": 3, "lce": 3, "scale": 0.4},
        {"regions": 3, "top_k": 2, "lce": 1},
        {"regions": 2, "top_k": None, "lce": 0},
        {"regions": 2, "top_k": None},
    ),
    neutral_base=all_tokens,
    exempt={
        "heads_alone": "all heads choose the regions together, and the scale is that of their width",
        "influence": "a key in a region that no region chooses moves nothing",
        "queries": "a query is in its region's mean, and so moves what the whole region reads",
    },
    card=Card(
        title="Bi-level routing attention (BiFormer)",
        paper="BiFormer: Vision Transformer with Bi-Level Routing Attention (2023)",
        year=2023,
        idea="regions choose regions by their mean queries and keys; tokens attend inside what was chosen",
        cost="O(N·k·N/S²·(D + E)) time; in memory k copies of keys and values, of some heads at a time",
        state="none",
        needs=("qkv", "vit"),
        lineage=("softmax",),
        neutral={"top_k": None, "lce": 0},
        caveat=(
            "scale and LCE's bias as in the official code: (H·D) ** -0.5, all heads. Sides that the regions do not "
            "divide are refused; the code can pad them, with zeros that count in means and softmax. Its last stage, "
            "top_k = None here, is full attention with LCE. The 3 x 3 convolution before each block is the layer's own"
        ),
    ),
)
