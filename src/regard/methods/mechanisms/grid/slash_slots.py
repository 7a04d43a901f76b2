"""Slot attention with a smoothing kernel (SLASH): slots compete for the places of an image, and refine themselves.

    l_im = LN(s_i) W_q · k_m / √D              slot i, place m; keys and values stay what they are
    a_im = softmax_i((ψ * l_i)_m) + ε          over the slots, so that they compete for each place
    u_i  = Σ_m a_im v_m / Σ_m a_im             over the places
    s_i  ← GRU(u_i, s_i);  s_i ← s_i + E(p_i);  s_i ← s_i + MLP(LN(s_i))

`iterations` times; queries are the slots to begin with, outputs those of the end. ψ is the attention refining kernel:
positive taps that sum to one, a learned low-pass filter on the map of each slot, so that single noisy places cannot
pull a slot. `kernel=0` leaves it out, which is Slot Attention (2020): slots and places then are sets, and either may
stand in any order. With `points` a place p_i = sigmoid(MLP(LN(s_i))) - 1/2 in [-1/2, 1/2]² is read off each slot and
encoded back into it; a few images with known places can teach it.

Worked by hand: slots (1, -1) and (-1, 1), which LN leaves as they are, W_q the identity. The first place has scores
±√2 log 3 √2/4 = ±(log 3)/2, so it goes to the slots by 3/4 and 1/4, the second by halves. All other weights are zero:
the GRU then halves a slot.

>>> import math, torch
>>> params = {n: torch.zeros_like(p) for n, p in init(Config(kernel=0), {"heads": 1, "key": 2}).items()}
>>> params |= {"query": torch.eye(2)[None], "norm": torch.ones(1, 2, 2)}
>>> q = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
>>> k = torch.tensor([[1.0, -1.0], [0.0, 0.0]])[None, None] * math.log(3) * 2**0.5 / 4
>>> cfg, call = Config(iterations=1, kernel=0, eps=0.0), Call("cross", params=params, grid=(1, 2))
>>> out, _, aux = reference(q, k, torch.zeros(1, 1, 2, 2), cfg, call)
>>> [[round(a, 3) for a in row] for row in aux["weights"][0, 0].tolist()], round(out[0, 0, 0, 0].item(), 3)
([[0.75, 0.5], [0.25, 0.5]], 0.5)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, Unsupported, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, mix, scores
from regard.ops.grid import as_image


@dataclass(frozen=True)
class Config:
    iterations: int = 3  # times that the slots ask the places and are updated; 0: they stay as they are
    kernel: int = 5  # places on a side of ψ; 0: none, which is Slot Attention
    points: bool = False  # whether a place in the image is read off each slot, and encoded back into it
    eps: float = 1e-8  # of the weights, before they are divided by their sum over places
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.iterations >= 0 and self.eps >= 0, "iterations >= 0 and eps >= 0", cfg=self)
        odd = self.kernel == 0 or (self.kernel > 0 and self.kernel % 2 == 1)
        require(odd, "a kernel has an odd number of places on a side, or 0", kernel=self.kernel)


def fits(cfg: Config, sides: Sides) -> None:
    require(len(sides) == 2 or not cfg.kernel, "the kernel is that of an image of two axes", grid=sides)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """As torch's own layers begin: uniform within ±1/√(numbers that are summed)."""
    heads, d = dims["heads"], dims["key"]
    half, quarter = max(d // 2, 1), max(d // 4, 1)
    layers = {"up": (2 * d, d), "down": (d, 2 * d)}
    if cfg.points:
        # three layers from a slot to its place, three back
        widths = (d, half, quarter, 2, quarter, half, d)
        layers |= {f"point_{i}": (widths[i + 1], widths[i]) for i in range(6)}
    shapes = {"query": (d, d), "gru_in": (3, d, d), "gru_state": (3, d, d), **layers}
    shapes = {name: (heads, *shape) for name, shape in shapes.items()}
    params = {name: uniform(shape, shape[-1]) for name, shape in shapes.items()}
    params |= {f"{n}_bias": uniform(p.shape[:-1], p.shape[-1]) for n, p in params.items() if n != "query"}
    norms = heads, 3 if cfg.points else 2, d
    params |= {"norm": torch.ones(norms), "norm_bias": torch.zeros(norms)}
    return params | ({"kernel": torch.randn(cfg.kernel, cfg.kernel)} if cfg.kernel else {})


def uniform(shape: tuple[int, ...], summed: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1) * summed**-0.5


def taps(kernel: Tensor) -> Tensor:
    """ψ of its parameters: over their length, then a softmax, so that all are positive and they sum to one.

    >>> taps(torch.tensor([[0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]))[1].mul(1e4).round().tolist()
    [933.0, 2536.0, 933.0]
    """
    return (kernel / kernel.norm().clamp(min=1e-12)).flatten().softmax(0).view_as(kernel)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict[str, Tensor]]:
    """Head by head."""
    check_widths(q, v)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    scale, outs, weights = q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale, [], []
    for h in range(q.shape[1]):
        p = {n: t.double() if n == "kernel" else t[h].double() for n, t in call.params.items()}
        s, a = q_h[:, h], q_h.new_zeros(*q_h[:, h, :, 0].shape, k.shape[2])
        for _ in range(cfg.iterations):
            logits = norm(s, p, 0) @ p["query"] @ k_h[:, h].mT * scale
            logits = smoothed(logits, p["kernel"], call.sides) if cfg.kernel else logits
            e = (logits - logits.amax(1, keepdim=True).detach()).exp()
            a = e / e.sum(1, keepdim=True) + cfg.eps
            s = updated(s, a / a.sum(2, keepdim=True) @ v_h[:, h], p, cfg)
        outs.append(s)
        weights.append(a)
    return torch.stack(outs, 1).to(v.dtype), None, {"weights": torch.stack(weights, 1).to(v.dtype)}


def check_widths(q: Tensor, v: Tensor) -> None:
    if q.shape[3] != v.shape[3]:
        raise Unsupported(f"values update slots: widths {q.shape[3]} of queries and {v.shape[3]} of values")


def norm(s: Tensor, p: dict[str, Tensor], i: int) -> Tensor:
    centred = s - s.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * p["norm"][i] + p["norm_bias"][i]


def smoothed(logits: Tensor, kernel: Tensor, sides: Sides) -> Tensor:
    """Tap by tap over a border of zeros; [B, K, M]."""
    psi, r, size = taps(kernel), len(kernel) // 2, range(len(kernel))
    wide = F.pad(logits.unflatten(2, sides), (r, r, r, r))
    (rows, columns), total = sides, torch.zeros_like(logits)
    for i, j in ((i, j) for i in size for j in size):
        total = total + psi[i, j] * wide[:, :, i : i + rows, j : j + columns].flatten(2)
    return total


def updated(s: Tensor, u: Tensor, p: dict[str, Tensor], cfg: Config) -> Tensor:
    """[B, K, D] slots after what they took from the places."""
    r_u, z_u, n_u = (u @ p["gru_in"][i].mT + p["gru_in_bias"][i] for i in range(3))
    r_s, z_s, n_s = (s @ p["gru_state"][i].mT + p["gru_state_bias"][i] for i in range(3))
    z = (z_u + z_s).sigmoid()
    s = (1 - z) * torch.tanh(n_u + (r_u + r_s).sigmoid() * n_s) + z * s
    if cfg.points:
        t = norm(s, p, 2)
        for i in range(6):
            t = t @ p[f"point_{i}"].mT + p[f"point_{i}_bias"]
            t = t.sigmoid() - 0.5 if i == 2 else t.relu() if i < 5 else t
        s = s + t
    return s + (norm(s, p, 1) @ p["up"].mT + p["up_bias"]).relu() @ p["down"].mT + p["down_bias"]


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict[str, Tensor]]:
    """All heads at once; products with places in the dtype of the input, slots in float32 at least."""
    check_widths(q, v)
    s, weights = at_least_float32(q), q.new_zeros(*q.shape[:3], k.shape[2])
    p = {name: t.to(s.dtype) for name, t in call.params.items()}
    psi = F.normalize(p["kernel"].flatten(), dim=0).softmax(0) if cfg.kernel else None
    for _ in range(cfg.iterations):
        asked = (layer_norm(s, p, 0) @ p["query"]).to(k.dtype)
        logits = scores(asked, k, q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale)  # [B, H, K, M]
        if psi is not None:
            maps = as_image(logits.flatten(0, 2)[:, :, None], call.sides)
            logits = F.conv2d(maps, psi.view(1, 1, cfg.kernel, -1), padding=cfg.kernel // 2).view_as(logits)
        weights = logits.softmax(2) + cfg.eps
        u = at_least_float32(mix(weights / weights.sum(3, keepdim=True), v))
        s = gated(s, u, p)
        s = s + mlp(points_of(s, p), p, "point_3", "point_4", "point_5") if cfg.points else s
        s = s + mlp(layer_norm(s, p, 1), p, "up", "down")
    return s.to(v.dtype), None, {"weights": weights.to(v.dtype)}


def mlp(t: Tensor, p: dict[str, Tensor], *names: str) -> Tensor:
    for name in names:
        t = (t if name == names[0] else t.relu()) @ p[name].mT + p[f"{name}_bias"][:, None]
    return t


def layer_norm(s: Tensor, p: dict[str, Tensor], i: int) -> Tensor:
    return F.layer_norm(s, s.shape[-1:]) * p["norm"][:, i, None] + p["norm_bias"][:, i, None]


def gated(s: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    (r_u, z_u, n_u), (r_s, z_s, n_s) = (
        (t @ p[name].flatten(1, 2).mT + p[f"{name}_bias"].flatten(1)[:, None]).chunk(3, -1)
        for t, name in ((u, "gru_in"), (s, "gru_state"))
    )
    new = torch.tanh(n_u + torch.sigmoid(r_u + r_s) * n_s)
    return torch.lerp(new, s, torch.sigmoid(z_u + z_s))


def points_of(s: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[B, H, K, 2] where slots [B, H, K, D] say that they are, y and x, the image from -1/2 to 1/2."""
    return mlp(layer_norm(s, p, 2), p, "point_0", "point_1", "point_2").sigmoid() - 0.5


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("cross",),
    unsupported=dict.fromkeys(
        ("self", "causal_self", "causal_cross"), "slots ask the places of an image, all at once"
    ),
    grid=OnGrid(fits, axes=(1, 2), permutes=lambda cfg: not cfg.kernel),
    neutral_base=lambda q, k, v, call: q,
    test_settings=({"kernel": 0, "points": True, "iterations": 2, "eps": 1e-3, "scale": 0.7},),
    exempt={"queries": "slots compete for the places: each of them moves all"},
    card=Card(
        title="Slot attention with a smoothing kernel (SLASH)",
        paper="Shepherding Slots to Objects: Towards Stable and Robust Object-Centric Learning, arXiv:2303.17842",
        year=2023,
        idea="slots compete for places by a softmax over slots, on score maps that a learned low-pass kernel smooths",
        cost="O(T·K·(M·(D + w²) + D²)) time for T iterations, K slots, M places, a kernel of w x w",
        state="none: whole images at once",
        needs=("qkv", "cnn-features"),
        lineage=("slot attention (Locatello et al., 2020)", "inverted softmax"),
        neutral={"iterations": 0},
        caveat=(
            "for cross: queries are the slots to begin with, drawn by the caller, keys and values projected, normed "
            "features of places, whose grid `roles` say. As in the released code ψ smooths scores, not the softmax, "
            "and points are read off slots, not maps. There the kernel is overwritten by its normalised self in every "
            "forward, so it is soon a box filter and cannot learn; here gradients pass the normalisation. Ask for one "
            "head: several have a GRU each. Matching labelled places to slots is the caller's (`points_of`)"
        ),
    ),
)
