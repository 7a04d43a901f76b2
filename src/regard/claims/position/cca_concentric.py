"""Concentric Causal Attention's claim, on a random stack: does the text know two patches of a ring apart?"""

import torch
from torch import Tensor

from regard.claims.lab import difference, generator
from regard.core.claim import Claim, Measured
from regard.core.mask import causal
from regard.methods.positions import cca_concentric as cca

SIDE, BEFORE, AFTER = 24, 4, 8
LAYERS, HEADS, WIDTH = 3, 2, 32


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """RoPE on [H, N, D] at integer positions [N]."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)  # [N, D/2]
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def stack(x: Tensor, weights: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    """LAYERS layers of attention with RoPE and a residual, [N, WIDTH] -> [N, WIDTH]."""
    for w_q, w_k, w_v in weights:
        normalised = torch.nn.functional.layer_norm(x, x.shape[-1:])
        q, k, v = ((normalised @ w).view(len(x), HEADS, -1).transpose(0, 1) for w in (w_q, w_k, w_v))
        q, k = rotate(q, position), rotate(k, position)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(x.shape)
    return x


def swaps(rings: Tensor, g: torch.Generator) -> list[tuple[int, int]]:
    """A random pair of patches of every ring, as token indices."""
    pairs = []
    for ring in rings.unique():
        members = (rings == ring).nonzero().flatten()
        one, other = members[torch.randperm(len(members), generator=g)[:2]].tolist()
        pairs.append((BEFORE + one, BEFORE + other))
    return pairs


def measure() -> Measured:
    g = generator()
    cfg, roles = cca.Config(SIDE, SIDE), cca.image_roles(SIDE, SIDE, BEFORE, AFTER)
    n, text = roles.length, roles["image"] == 0
    x = torch.randn(n, WIDTH, generator=g, dtype=torch.float64)
    weights = torch.randn(LAYERS, 3, WIDTH, WIDTH, generator=g, dtype=torch.float64) * WIDTH**-0.5
    schemes = {
        "concentric": (cca.positions(roles, cfg), cca.build(cfg).dense(n, roles=roles)[0]),
        "raster": (torch.arange(n), causal().dense(n)[0]),
    }
    rings = schemes["concentric"][0]
    pairs = swaps(rings[~text] - BEFORE, g)
    deltas: dict[str, list[float]] = {}
    for name, (position, mask) in schemes.items():
        out = stack(x, weights, position, mask)[text]
        deltas[name] = []
        for one, other in pairs:
            swapped = x.clone()
            swapped[[one, other]] = x[[other, one]]
            changed = stack(swapped, weights, position, mask)[text]
            deltas[name].append(difference(changed, out))
    first = BEFORE + SIDE * SIDE
    distance = {name: int((p[first] - p[:first][~text[:first]]).max()) for name, (p, _) in schemes.items()}
    numbers = {
        "rings_swapped": len(pairs),
        "concentric_largest_change": max(deltas["concentric"]),
        "raster_smallest_change": min(deltas["raster"]),
        "raster_largest_change": max(deltas["raster"]),
        "concentric_distance": distance["concentric"],
        "raster_distance": distance["raster"],
    }
    parts = {
        "blind within a ring": max(deltas["concentric"]) < 1e-5,
        "raster is not": min(deltas["raster"]) > 1e-3,
        "distance": distance["concentric"] == SIDE // 2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="cca_concentric",
    statement=(
        "swapping two patches of one ring leaves all text outputs as they were, and the largest distance "
        "from the text to a patch falls from H * W to H / 2 (576 to 12 for 24 x 24)"
    ),
    bound=(
        "same-ring swap: largest change < 1e-5, while every such swap changes raster causal RoPE by more "
        "than 1e-3; distance from the first text token at most, and exactly, H // 2"
    ),
    measure=measure,
)
