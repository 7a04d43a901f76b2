"""Windows of an image with zeros around it: each place reads w x w places, d apart, and zeros beyond a border.

The side w is odd, and the place itself in the middle. Nothing is gathered: one place of all windows is a shifted view
of the padded image, so scores and sums are w² passes over it, and no copy is larger than the image with its padding.
Channels stand before the places meanwhile, so that a pass runs along the rows of the image. Wide windows of a softmax
share their keys: a tile of queries reads the box of keys that any of them reads, by one fused call.

>>> inside((2, 3), 3)[0].tolist()  # up and left of a place: only two places of the lower row have one
[False, False, False, False, True, True]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.machine import product_dtype
from regard.ops.softmax import at_least_float32, per_query_head

WIDE = 5  # windows of this side and more are read in tiles: changes the speed only
TILE = 4  # places of a tile on each axis: changes the speed only

Sides = tuple[int, ...]


def shifted(x: Tensor, sides: Sides, window: int, dilation: int = 1) -> list[Tensor]:
    """w² views [..., y, x] of planes [..., y, x]: what stands at each place of all windows, up and left first."""
    padded = F.pad(x, 4 * (dilation * (window // 2),))
    steps = range(0, window * dilation, dilation)
    return [padded[..., y : y + sides[0], x : x + sides[1]] for y in steps for x in steps]


def inside(sides: Sides, window: int, dilation: int = 1, device: torch.device | None = None) -> Tensor:
    """[w², N] bool: which places of each window are places of the image."""
    return torch.stack(shifted(torch.ones(sides, device=device), sides, window, dilation)).flatten(1) > 0


def planes(x: Tensor, sides: Sides, heads: int) -> Tensor:
    """[B, H, C, y, x] in float32 at least, of tokens [B, G, N, C]."""
    return at_least_float32(per_query_head(x, heads)).mT.unflatten(3, sides).contiguous()


def window_scores(q: Tensor, k: Tensor, sides: Sides, window: int, dilation: int = 1) -> Tensor:
    """[B, H, w², N] products of q [B, H, N, D] with the keys [B, G, N, D] of its window, 0 beyond the image."""
    asked, keys = planes(q, sides, q.shape[1]), planes(k, sides, q.shape[1])
    rows = [(asked * key).sum(2) for key in shifted(keys, sides, window, dilation)]
    return torch.stack(rows, dim=2).flatten(3)


def window_sums(weights: Tensor, v: Tensor, sides: Sides, window: int, dilation: int = 1) -> Tensor:
    """[B, H, N, E] sums of the values [B, G, N, E] of each window by its weights [B, H, w², N]; zeros beyond it."""
    total, weights = weights.new_zeros(()), weights.unflatten(3, sides)
    values = planes(v, sides, weights.shape[1])
    for i, value in enumerate(shifted(values, sides, window, dilation)):
        total = torch.addcmul(total, weights[:, :, i, None], value)
    return total.flatten(3).mT


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, sides: Sides, window: int, dilation: int, scale: float
) -> Tensor:
    """[B, H, N, E] in v's dtype: softmax over all w² places of the window, keys and values beyond the image zero."""
    if window >= WIDE:
        return in_tiles(q, k, v, sides, window, dilation, scale).to(v.dtype)
    s = window_scores(q, k, sides, window, dilation) * scale
    return window_sums(s.softmax(2), v, sides, window, dilation).to(v.dtype)


def in_tiles(
    q: Tensor, k: Tensor, v: Tensor, sides: Sides, window: int, dilation: int, scale: float
) -> Tensor:
    """The same by one fused call: t x t queries, d apart, on the (t + w - 1)² keys that any of them reads."""
    batch, heads = q.shape[:2]
    q, k, v = (per_query_head(t, heads).expand(-1, heads, -1, -1).to(product_dtype(t)) for t in (q, k, v))
    size = min(TILE, *(-(-side // dilation) for side in sides))
    asked = tiles(q, sides, 1, dilation, size)
    keys, values = (tiles(t, sides, window, dilation, size) for t in (k, v))
    ahead = torch.arange(size + window - 1, device=q.device) - torch.arange(size, device=q.device)[:, None]
    seen = (ahead >= 0) & (ahead < window)  # [t, t + w - 1] on one axis
    both = (seen[:, None, :, None] & seen[:, None]).flatten(2).flatten(0, 1)
    bias = asked.new_zeros(both.shape).masked_fill(~both, -torch.inf)
    out = F.scaled_dot_product_attention(asked, keys, values, bias, scale=scale)  # [B·H, T, t², E]
    counts = [-(-side // (dilation * size)) for side in sides]
    shape = (batch, heads, dilation, dilation, *counts, size, size, v.shape[-1])
    image = out.reshape(shape).permute(
        0, 1, 4, 6, 2, 5, 7, 3, 8
    )  # [B, H, y tile, y in it, y residue, the same of x, E]
    image = image.flatten(5, 7).flatten(2, 4)
    return image[:, :, : sides[0], : sides[1]].flatten(2, 3)


def tiles(x: Tensor, sides: Sides, window: int, dilation: int, size: int) -> Tensor:
    """[B·H, T, (t + w - 1)², C] of x [B, H, N, C]: the keys of tiles of t x t queries of each residue modulo d."""
    before, span = dilation * (window // 2), size + window - 1
    whole = [dilation * (size * -(-side // (dilation * size)) + window - 1) for side in sides]
    pads = [(before, length - before - side) for length, side in zip(whole, sides, strict=True)]
    image = F.pad(x.unflatten(2, sides), (0, 0, *pads[1], *pads[0]))
    image = image.unflatten(3, (-1, dilation)).unflatten(
        2, (-1, dilation)
    )  # [B, H, y, residue, x, residue, C]
    boxes = image.unfold(2, span, size).unfold(4, span, size)  # [B, H, y, residue, x, residue, C, span, span]
    return boxes.permute(0, 1, 3, 5, 2, 4, 7, 8, 6).flatten(6, 7).flatten(2, 5).flatten(0, 1)


def window_of(place: int, sides: Sides, window: int, dilation: int = 1) -> tuple[list[int], list[bool]]:
    """The w² places that a place reads, and which of them the image has (0 stands for the others): the definition."""
    y, x = divmod(place, sides[1])
    steps = [dilation * (i - window // 2) for i in range(window)]
    near = [(y + a, x + b) for a in steps for b in steps]
    there = [0 <= a < sides[0] and 0 <= b < sides[1] for a, b in near]
    return [a * sides[1] + b if on else 0 for (a, b), on in zip(near, there, strict=True)], there
