"""Dual attention: layers take turns between windows of an image and channels that see all of it.

    window    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j          over j in i's window of w x w places
    channel   A = softmax(Qᵀ K / √D)                         [D, D] for each head, a row for each channel of q
              o = (A Vᵀ)ᵀ                                    each channel of o mixes the channels of v

A channel is a token as long as the image, so channels compare all places at once, at a cost that grows with their
number alone. Nothing in it depends on where a token stands. Layers 0, 2, ... read windows, layers 1, 3, ... channels.

Worked by hand: two tokens, of two channels each. q = k = (√(√2 log 3), 0) and (0, 0) make A's rows 3/4, 1/4 and 1/2,
1/2, so values (1, 3) and (2, 4) give (1.5, 2) and (2.5, 3). Windows of 2 x 2 on an image of 2 x 3, whose scores are all
equal: the second is half outside, where zeros stand, so the values 0 to 5 give (0 + 1 + 3 + 4)/4 and (2 + 5 + 0 + 0)/4.

>>> import math
>>> q = torch.tensor([[(2**0.5 * math.log(3)) ** 0.5, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
>>> v = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).view(1, 1, 2, 2)
>>> out, _ = reference(q, q, v, Config(attention="channel"), Call("self", grid=(1, 2)))
>>> out.round(decimals=5).flatten().tolist()
[1.5, 2.0, 2.5, 3.0]
>>> q, v = torch.zeros(1, 1, 6, 1), torch.arange(6.0).view(1, 1, 6, 1)
>>> reference(q, q, v, Config(window=2), Call("self", grid=(2, 3)))[0].flatten().tolist()
[2.0, 2.0, 1.75, 2.0, 2.0, 1.75]
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, Unsupported, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, for_products, heads_of, per_query_head
from regard.ops.grid import from_regions, some_heads, to_regions

TURNS = ("window", "channel")


@dataclass(frozen=True)
class Config:
    attention: Literal["alternate", "window", "channel"] = "alternate"  # or one of the two in every layer
    window: int | None = 7  # w, on each axis; None: the whole image
    roles: Literal["paper", "code"] = "paper"  # code: A = softmax(Kᵀ V / √D), o = (A Qᵀ)ᵀ
    scale: Literal["width", "places"] = "width"  # of channels: D ** -0.5; or N ** -0.5, as Florence-2 has it
    layer: int = 0  # from 0; by turns, even ones read windows and odd ones channels
    layers: int = 1  # of the model; bounds `layer`, changes nothing else

    def __post_init__(self) -> None:
        for name, values in (("attention", ("alternate", *TURNS)), ("roles", ("paper", "code")),
                             ("scale", ("width", "places"))):  # fmt: skip
            require(
                getattr(self, name) in values, f"{name} is one of {values}", **{name: getattr(self, name)}
            )
        require(self.window is None or self.window >= 1, "window >= 1", window=self.window)
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)

    @property
    def turn(self) -> str:
        """Which of the two this layer is."""
        return TURNS[self.layer % 2] if self.attention == "alternate" else self.attention


def check_widths(q: Q, v: V) -> None:
    """Unsupported where the output of a channel layer, as wide as the keys, is not as wide as the values."""
    if q.shape[3] != v.shape[3]:
        raise Unsupported(
            f"channels of keys weigh those of values: as many of both, not {q.shape[3]} and {v.shape[3]}"
        )


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    if cfg.turn == "channel":
        check_widths(q, v)
        asked, keys, values = (q_h, k_h, v_h) if cfg.roles == "paper" else (k_h, v_h, q_h)
        scale, rows = {"width": q.shape[3], "places": q.shape[2]}[cfg.scale] ** -0.5, []
        for c in range(q.shape[3]):
            a = torch.einsum("bhn,bhnd->bhd", asked[..., c], keys) * scale  # of channel c to all
            rows.append(torch.einsum("bhd,bhnd->bhn", a.softmax(-1), values))
        return torch.stack(rows, dim=-1).to(v.dtype), None
    out = torch.zeros_like(q_h[..., :1] * v_h)
    for at in windows(call.sides, cfg.window):
        s = q_h[:, :, at] @ k_h[:, :, at].mT * q.shape[-1] ** -0.5
        beyond = 0 if cfg.window is None else cfg.window**2 - len(at)
        a = F.pad(s, (0, beyond)).softmax(-1)  # places beyond the border are keys of zeros
        out[:, :, at] = a[..., : len(at)] @ v_h[:, :, at]
    return out.to(v.dtype), None


def windows(sides: Sides, w: int | None) -> list[list[int]]:
    """The places of each window."""
    found: dict[tuple[int, int], list[int]] = {}
    for i in range(sides[0] * sides[1]):
        y, x = divmod(i, sides[1])
        found.setdefault((0, 0) if w is None else (y // w, x // w), []).append(i)
    return list(found.values())


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    heads, dtype = q.shape[1], v.dtype
    k, v = (per_query_head(t, heads).expand(-1, heads, -1, -1) for t in (k, v))
    if cfg.turn == "channel":
        check_widths(q, v)
        scale = (q.shape[3] if cfg.scale == "width" else q.shape[2]) ** -0.5
        q, k, v = (at_least_float32(t) for t in (q, k, v))
        asked, keys, values = (q, k, v) if cfg.roles == "paper" else (k, v, q)
        a = (asked.mT @ keys * scale).softmax(-1)  # [B, H, D, D]
        return (values @ a.mT).to(dtype), None
    q, k, v = for_products(q, k, v)
    if cfg.window is None:
        return F.scaled_dot_product_attention(q, k, v).to(dtype), None
    return in_windows(q, k, v, call.sides, cfg.window).to(dtype), None


def in_windows(q: Q, k: K, v: V, sides: Sides, w: int) -> Out:
    """Attention in each window by itself, some heads at a time; zeros fill up the image at the right and below."""
    (high, wide), (below, right) = sides, (-side % w for side in sides)
    filled, outs = (high + below, wide + right), []
    places = filled[0] * filled[1]
    for some in some_heads(q, k, v, read=(places, places)):
        images = (F.pad(t.unflatten(1, sides), (0, 0, 0, right, 0, below)) for t in some)
        parts = (to_regions(t.flatten(1, 2), filled, (w, w)) for t in images)  # [r, R, w², D]
        out = from_regions(F.scaled_dot_product_attention(*parts), filled, (w, w))
        outs.append(out.unflatten(1, filled)[:, :high, :wide].flatten(1, 2))
    return torch.cat(outs).unflatten(0, q.shape[:2])


def local(cfg: Config) -> tuple[int, int] | None:
    if cfg.turn == "channel" or cfg.window is None:
        return None
    return cfg.window - 1, cfg.window


REFUSED = "a window, and a channel, is read by all that stand in it"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self",),
    unsupported=dict.fromkeys(("causal_self", "cross", "causal_cross"), REFUSED),
    grid=OnGrid(
        lambda cfg, sides: None,
        local=local,
        permutes=lambda cfg: cfg.turn == "channel" or cfg.window is None,
    ),
    exempt={"queries": "a query is in what its channels, which every place reads, are weighed by"},
    test_settings=(
        {"window": 3},
        {"layer": 1, "layers": 2},
        {"layer": 2, "layers": 4, "window": 2},
        {"attention": "channel", "roles": "code"},
        {"attention": "channel", "scale": "places"},
        {"attention": "window", "window": None, "layer": 1, "layers": 2},
    ),
    card=Card(
        title="Dual attention (DaViT)",
        paper="DaViT: Dual Attention Vision Transformers (2022)",
        year=2022,
        idea="layers take turns: attention in windows, and attention between channels, which see the whole image",
        cost="O(N·w²·(D + E)) time in windows, O(N·D²) between channels",
        state="none",
        needs=("qkv", "vit"),
        lineage=("softmax",),
        neutral={"attention": "window", "window": None},
        caveat=(
            "A head is a group of channels. The official code has other roles, roles='code' here: A comes from keys "
            "and values. Florence-2 has the paper's, with scale='places': by the width, logits grow with the image. "
            "As in both, zeros fill up windows at the right and below, and the softmax counts them. The depth-wise "
            "convolutions before each sublayer are the layer's own"
        ),
    ),
)
