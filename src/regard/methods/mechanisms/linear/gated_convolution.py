"""Gated long convolution: Hyena's operator of order two, the usual baseline without attention for recall.

    u_t = k_t ⊙ v_t
    o_t = q_t ⊙ Σ_{s <= t} h_{t-s} ⊙ u_s            per head and channel, D = E
    h_l = (e^{-δ l/L} + floor) · MLP([l/L, cos(2πf l/L), sin(2πf l/L)])    f = 1 .. bands, sines between the layers

The filter h is the same for every text: what a token passes on depends on how far it is, not on who asks, and the two
gates are all that depends on the content. Since h is a function of the distance l it has no length; L is the unit in
which distances are counted. δ goes from log(100)/1.5 to log(100)/0.3 over the channels, slow to fast forgetting; the
floor keeps the filter from vanishing however far.

self is two-sided: h at the distance |t - s|, each token once. A state holds every u so far, and a decode step is one
product with the reversed filter. Distances count the tokens that are there: a hidden one stands nowhere.

Worked by hand: a last layer of 0 except its bias-free weight on a unit that is sin(π/2) = 1 makes h the window alone,
e^{-δ l/L}: with δ = log(100)/1.5 and L = 1 h_0 = 1, h_1 = 100^(-2/3) = 0.0464. Values 1 and 1: outputs 1 and 1.0464.

>>> import math, torch
>>> one, cfg = torch.ones(1, 1, 2, 1, dtype=torch.float64), Config(length=1, floor=0.0, hidden=1, layers=1)
>>> params = {"w_0": torch.zeros(3, 1), "b_0": torch.tensor([math.pi / 2]), "frequency": torch.ones(1)}
>>> call = Call(params=params | {"w_out": torch.ones(1, 1)})
>>> out, _ = reference(one, one, one, cfg, call)
>>> [round(o, 4) for o in out.flatten().tolist()]
[1.0, 1.0464]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, Unsupported, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head, shown

NO_DISTANCE = "its filter weighs by distance, which two texts do not have"


@dataclass(frozen=True)
class Config:
    length: int = 1024  # the unit of distance: the window forgets slow channels to 1/100 at 1.5 of it
    floor: float = 0.05  # added to the window at every distance
    bands: int = 1  # sines and cosines of the distance
    hidden: int = 16  # width of the filter's MLP between its layers; as many sines
    layers: int = 3  # with a sine after each; one linear map follows

    def __post_init__(self) -> None:
        smallest = min(self.length, self.bands, self.hidden, self.layers)
        require(smallest >= 1, "length, bands, hidden and layers are at least 1", cfg=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    widths = [1 + 2 * cfg.bands, *[cfg.hidden] * cfg.layers]
    # of the sines; learned
    params = {"frequency": torch.ones(cfg.hidden)}
    for i, (rows, columns) in enumerate(pairwise(widths)):
        params[f"w_{i}"] = torch.empty(rows, columns).uniform_(-1, 1) * rows**-0.5
        params[f"b_{i}"] = torch.empty(columns).uniform_(-1, 1) * rows**-0.5
    width = dims["heads"] * dims["key"]
    params["w_out"] = torch.empty(cfg.hidden, width).uniform_(-1, 1) * cfg.hidden**-0.5
    return params


def check_widths(k: K, v: V) -> None:
    if k.shape[3] != v.shape[3]:
        widths = f"{k.shape[3]} and {v.shape[3]}"
        raise Unsupported(f"keys gate values channel by channel: widths {widths} differ")


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    check_widths(k, v)
    state = k * v if call.initial_state is None else torch.cat([call.initial_state, k * v], dim=2)
    n, m, heads = q.shape[2], state.shape[2], q.shape[1]
    q_h, u = exact(q, heads_of(state, heads))
    there = torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    u, place = torch.where(there[..., None], u, 0.0), (there.cumsum(-1) - 1).clamp(min=0)
    h = torch.stack([filter_at(distance, cfg, call) for distance in range(m)])
    h = h.unflatten(1, (heads, -1)).transpose(0, 1)  # [H, M, D]
    head, rows = torch.arange(heads, device=q.device)[:, None], []
    for i, t in enumerate(range(m - n, m)):
        s = slice(m if call.pattern == "self" else t + 1)
        distance = (place[:, :, t, None] - place[:, :, s]).abs()  # [B|1, H|1, S], in tokens that are there
        rows.append(q_h[:, :, i] * (h[head, distance] * u[:, :, s]).sum(2))
    return torch.stack(rows, dim=2).to(v.dtype), state if call.pattern == "causal_self" else None


def filter_at(distance: int, cfg: Config, call: Call) -> Tensor:
    """h_l [H·D] at one distance, as the equation has it; of the reference only."""
    p = {name: t.double() for name, t in call.params.items()}
    share, width = distance / cfg.length, p["w_out"].shape[1]
    waves = [2 * math.pi * f * share for f in range(1, cfg.bands + 1)]
    z = p["w_out"].new_tensor([share, *map(math.cos, waves), *map(math.sin, waves)])
    for i in range(cfg.layers):
        z = torch.sin(p["frequency"] * (z @ p[f"w_{i}"] + p[f"b_{i}"]))
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    deltas = [slow + (fast - slow) * c / max(width - 1, 1) for c in range(width)]
    window = [math.exp(-delta * share) + cfg.floor for delta in deltas]
    return z.new_tensor(window) * (z @ p["w_out"])


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    check_widths(k, v)
    state = k * v
    if call.initial_state is not None:
        state = torch.cat([call.initial_state, state], dim=2)
    n, m, heads = q.shape[2], state.shape[2], q.shape[1]
    u = at_least_float32(per_query_head(state, heads)).expand(-1, heads, -1, -1)
    q, u, place = at_least_float32(q), shown(u, call.key_mask), None
    h = filters(call.params, cfg, heads, u)
    if call.key_mask is not None:
        place = (call.key_mask.cumsum(-1) - 1).clamp(min=0)
    if n == 1 and call.pattern != "self":
        return (q * (latest(h, place) * u).sum(2, keepdim=True)).to(v.dtype), state
    u = together(u, place)
    mixed = convolved(u, h)
    if call.pattern == "self":
        mixed = mixed + convolved(u.flip(2), h).flip(2) - h[:, None, :, 0] * u
    mixed = mixed if place is None else mixed.gather(2, wide(place, mixed))
    return (q * mixed[:, :, m - n :]).to(v.dtype), state if call.pattern == "causal_self" else None


def wide(place: Tensor, like: Tensor) -> Tensor:
    return place[..., None].expand_as(like)


def together(u: Tensor, place: Tensor | None) -> Tensor:
    """u [B, H, M, D] with the tokens that are there at their places [B|1, H|1, M], and zeros behind the last."""
    return u if place is None else torch.zeros_like(u).scatter_add(2, wide(place, u), u)


def latest(h: Tensor, place: Tensor | None) -> Tensor:
    """[.., M, D]: the filter h [H, D, M] at the distance of every token from the last that is there."""
    if place is None:
        return h.flip(-1).mT
    distance = (place[..., -1:] - place)[:, :, None]  # [B|1, H|1, 1, M]
    h = h.expand(len(place), *h.shape)
    return h.gather(3, distance.expand(-1, h.shape[1], h.shape[2], -1)).mT


def filters(params: Mapping[str, Tensor], cfg: Config, heads: int, u: Tensor) -> Tensor:
    """h [H, D, M] for the distances 0 .. M - 1, in the dtype of u [B, H, M, D]."""
    p = {name: t.to(u.dtype) for name, t in params.items()}
    far = torch.arange(u.shape[2], dtype=u.dtype, device=u.device)[:, None] / cfg.length
    angle = 2 * math.pi * far * torch.arange(1, cfg.bands + 1, dtype=u.dtype, device=u.device)
    z = torch.cat([far, angle.cos(), angle.sin()], dim=-1)  # [M, 1 + 2·bands]
    for i in range(cfg.layers):
        z = (p["frequency"] * (z @ p[f"w_{i}"] + p[f"b_{i}"])).sin()
    slow, fast = (math.log(100) / share for share in (1.5, 0.3))
    delta = torch.linspace(slow, fast, heads * u.shape[3], dtype=u.dtype, device=u.device)
    return ((z @ p["w_out"]) * ((-delta * far).exp() + cfg.floor)).mT.unflatten(0, (heads, -1))


def convolved(u: Tensor, h: Tensor) -> Tensor:
    """Σ_{s <= t} h_{t-s} u_s [B, H, M, D], through the Fourier transform, with room so that nothing wraps round."""
    m, room = u.shape[2], 2 * u.shape[2]
    spectrum = torch.fft.rfft(u, room, dim=2) * torch.fft.rfft(h.mT, room, dim=1)
    return torch.fft.irfft(spectrum, room, dim=2)[:, :, :m]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    order_aware=True,
    patterns=("self", "causal_self"),
    unsupported={"cross": NO_DISTANCE, "causal_cross": NO_DISTANCE},
    test_settings=({"length": 8, "bands": 2, "hidden": 4, "layers": 1},),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * dims["key"],
    exempt={
        "neutral": "its weights know distances only: no filter makes them depend on who asks",
        "heads_alone": "windows go from slow to fast over the channels of all heads",
    },
    card=Card(
        title="Gated long convolution (Hyena, order 2)",
        paper="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        year=2023,
        idea="a long implicit filter mixes tokens by distance, elementwise gates before and after it by content",
        cost="O(N·log N·D) time; a decode step O(n·D) and the filter's MLP at n distances",
        state="every product k⊙v so far: D·n numbers per KV head",
        needs=("qkv",),
        caveat=(
            "the short convolutions on q, k and v belong to the layer; the released code takes frequencies from 1e-4 "
            "to bands - 1, so that its default single band is next to constant, where 1 .. bands stand here, and it "
            "adds a learned weight at distance 0, which is left out; its distance is l/(L - 1) in the first input of "
            "the MLP and in the window, where here it is l/L everywhere, as in its waves; the two-sided form for self "
            "is not the paper's; fast and reference differ by the rounding of the Fourier transform, through which in "
            "float32 a later token may move an earlier output by 1e-7 of the largest"
        ),
    ),
)
