"""Softmax attention of each place of a grid to its nearest places: tiles of queries over the keys that they share.

On each axis a place at i reads the w places of its own residue modulo d that are nearest to it. Near a border the
window is moved inwards, not cut: everyone reads w. With stride s, s neighbours read one window, that of the one in
their middle; a causal axis reads w places up to i itself, and fewer where it begins. A window as long as an axis is
all of it.

A tile of queries that lie together reads the box of keys that any of them reads, and a mask says which each of them
does. The box is a product of spans, one for each axis, so one rule serves lines, images and clips.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.errors import require
from regard.ops.machine import product_dtype
from regard.ops.softmax import per_query_head

PIECE = 1 << 21  # numbers that are gathered at once: changes the speed and the memory only
TILE = {1: 64, 2: 8, 3: 4}  # places of a tile on each axis, by the number of axes: changes the speed only


@dataclass(frozen=True)
class Axis:
    """window: places read on this axis; dilation: steps between them; stride: how many read one window together."""

    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.dilation >= 1, "dilation >= 1", dilation=self.dilation)
        rule = "1 <= stride <= window: those who read one window together stand in it"
        require(1 <= self.stride <= self.window, rule, stride=self.stride, window=self.window)


def check_axes(axes: Sequence[Axis], sides: tuple[int, ...]) -> None:
    """ValueError where a dilation leaves a place without any neighbour."""
    for axis, side in zip(axes, sides, strict=True):
        rule = "a dilation leaves every place a neighbour: 2·dilation <= side"
        alone = axis.dilation > 1 and axis.window > 1 and 2 * axis.dilation > side
        require(not alone, rule, dilation=axis.dilation, side=side)


class Spans(NamedTuple):
    """The tiles of one axis: T of them, of t queries and W keys.

    q [T, t] places; real [T, t], False where a tile is filled up; k [T, W] places; seen [T, t, W]; steps [T, t, W] from
    query to key, counted in dilations.
    """

    q: Tensor
    real: Tensor
    k: Tensor
    seen: Tensor
    steps: Tensor


def nearest_attention(
    q: Tensor, k: Tensor, v: Tensor, sides: tuple[int, ...], axes: Sequence[Axis], scale: float,
    table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, N, E] in v's dtype; q [B, H, N, D], k [B, G, N, D], v [B, G, N, E].

    table [H, 2w - 1, ...] has a learned bias for every number of steps on each axis, -(w - 1) first.
    """
    size = TILE[len(sides)]
    spans = [spans_of(side, axis, size, q.device) for side, axis in zip(sides, axes, strict=True)]
    at_q, at_k = (places([span[i] for span in spans], sides) for i in (0, 2))  # [T, t], [T, W]
    seen = product([span.seen for span in spans], 2)  # [T, t, W]
    back = slots(at_q, product([span.real for span in spans], 1), math.prod(sides))
    batch, heads, dtype = q.shape[0], q.shape[1], v.dtype
    q, k, v = (per_query_head(t, heads).expand(-1, heads, -1, -1).to(product_dtype(t)) for t in (q, k, v))
    masked = q.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)[None]
    steps = [span.steps + axis.window - 1 for span, axis in zip(spans, axes, strict=True)]
    outs, head = [], 0
    for some in some_heads(q, k, v, read=(at_q.numel(), at_k.numel())):
        asked, keys, values = (gathered(t, at) for t, at in zip(some, (at_q, at_k, at_k), strict=True))
        bias = masked
        if table is not None:
            own = [(head + i) % heads for i in range(len(asked))]
            bias, head = masked + bias_of(table.to(q.dtype)[own], steps), head + len(asked)
        out = F.scaled_dot_product_attention(asked, keys, values, bias, scale=scale)  # [M, T, t, E]
        outs.append(given_back(out, back))
    return torch.cat(outs).unflatten(0, (batch, heads)).to(dtype)


def some_heads(q: Tensor, k: Tensor, v: Tensor, read: tuple[int, int]) -> Iterator[tuple[Tensor, ...]]:
    """q, k, v [M, N, D] of [B, H, N, D], M of the B·H heads after each other.

    read: how many queries, and keys, the tiles of one head hold: as many heads go together as fill a piece, so that
    what is gathered comes from memory that was just freed, not from fresh pages.
    """
    together = max(1, PIECE // max(1, read[0] * q.shape[3] + read[1] * (k.shape[3] + v.shape[3])))
    yield from zip(*(t.flatten(0, 1).split(together) for t in (q, k, v)), strict=True)


def slots(at: Tensor, real: Tensor, tokens: int) -> Tensor:
    """[N] where in tiles of queries [T, t] each place is asked; what fills a tile up comes before all."""
    slot = torch.arange(at.numel(), device=at.device).masked_fill(~real.flatten(), -1)
    return slot.new_full((tokens,), -1).scatter_reduce(0, at.flatten(), slot, "amax")


def given_back(x: Tensor, back: Tensor) -> Tensor:
    """[M, N, E] of tiles [M, T, t, E], each place from its slot."""
    rows = x.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # [T·t, M·E]
    return taken(rows, back).unflatten(1, (-1, x.shape[-1])).transpose(0, 1)


def spans_of(side: int, axis: Axis, size: int, device: Any = None) -> Spans:
    """The tiles of an axis: of each residue, `size` queries after the other.

    What decides about shapes is counted in whole numbers, so that torch.compile knows it.
    """
    d = axis.dilation
    size = min(size, -(-side // d))
    counts = [-(-(side - residue) // d) for residue in range(min(d, side))]
    starts = [(residue, n, first) for residue, n in enumerate(counts) for first in range(0, n, size)]
    windows = [[window_of(min(f + i, n - 1), n, axis) for i in range(size)] for _, n, f in starts]
    span = max(reads[-1][1] - reads[0][0] for reads in windows)
    low, high = torch.tensor(windows, device=device).unbind(-1)  # [T, t]
    residue, count, first = torch.tensor(starts, device=device).mT[:, :, None]
    own = first + torch.arange(size, device=device)
    i = own.minimum(count - 1)
    j = low[:, :1] + torch.arange(span, device=device)
    steps = (j[:, None] - i[..., None]).clamp(1 - axis.window, axis.window - 1)
    seen = (j[:, None] >= low[..., None]) & (j[:, None] < high[..., None])
    return Spans(i * d + residue, own < count, j.minimum(count - 1) * d + residue, seen, steps)


def window_of(i: int, count: int, axis: Axis) -> tuple[int, int]:
    """The first place that place i of `count` reads, and that after the last."""
    w, s = axis.window, axis.stride
    if axis.causal:
        leader = min(i // s * s + s - 1, count - 1)
        return max(leader - w + 1, 0), i + 1
    leader = min(i // s * s + s // 2, count - 1)
    low = max(min(leader - w // 2, count - w), 0)
    return low, min(low + w, count)


def places(parts: Sequence[Tensor], sides: tuple[int, ...]) -> Tensor:
    """[T, t] numbers of places, row by row, of the tiles of all axes, whose parts on each are [T', t']."""
    number, tiles, size = parts[0], len(parts[0]), parts[0].shape[1]
    for part, side in zip(parts[1:], sides[1:], strict=True):
        number = number[:, None, :, None] * side + part[None, :, None]
        tiles, size = tiles * len(part), size * part.shape[1]
        number = number.reshape(tiles, size)
    return number


def product(parts: Sequence[Tensor], inner: int) -> Tensor:
    """[T, t] or [T, t, W] bool: True where it is on every axis."""
    whole = parts[0]
    for part in parts[1:]:
        if inner == 1:
            whole = (whole[:, None, :, None] & part[None, :, None]).flatten(2).flatten(0, 1)
        else:
            whole = whole[:, None, :, None, :, None] & part[None, :, None, :, None]
            whole = whole.flatten(4).flatten(2, 3).flatten(0, 1)
    return whole


def bias_of(table: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """[H, T, t, W] of a table [H, ...] with an axis for each of the grid; steps are [T', t', W'] on each."""
    sizes = table.shape[1:]
    number = steps[0]
    for part, size in zip(steps[1:], sizes[1:], strict=True):
        number = number[:, None, :, None, :, None] * size + part[None, :, None, :, None]
        number = number.flatten(4).flatten(2, 3).flatten(0, 1)
    return table.flatten(1)[:, number]


def gathered(x: Tensor, at: Tensor) -> Tensor:
    """[M, T, t, D] of x [M, N, D] at the places [T, t]."""
    rows = x.transpose(0, 1).flatten(1)  # [N, M·D]
    return taken(rows, at).unflatten(-1, (-1, x.shape[-1])).permute(2, 0, 1, 3)


def taken(rows: Tensor, at: Tensor) -> Tensor:
    """Rows of [N, C] at `at`: as an embedding, whose gradient is many times quicker than that of an index."""
    return F.embedding(at, rows)


def neighbours(side: int, axis: Axis) -> list[list[int]]:
    """Which places each place of an axis reads, in order: the definition, place by place."""
    found = []
    for place in range(side):
        own = [p for p in range(side) if p % axis.dilation == place % axis.dilation]
        i, w, s = own.index(place), min(axis.window, len(own)), axis.stride
        if axis.causal:
            last = min(i - i % s + s - 1, len(own) - 1)
            found.append([p for j, p in enumerate(own) if last - axis.window < j <= i])
            continue
        middle = min(i - i % s + s // 2, len(own) - 1)
        # all windows of w places, the one whose place w // 2 is nearest to the middle
        first = min(range(len(own) - w + 1), key=lambda f: (abs(f + axis.window // 2 - middle), f))
        found.append(own[first : first + w])
    return found


def boxes(sides: tuple[int, ...], axes: Sequence[Axis]) -> list[list[int]]:
    """Which places of a grid each place reads: on every axis those that it reads there."""
    lines = [neighbours(side, axis) for side, axis in zip(sides, axes, strict=True)]
    found: list[list[int]] = []
    for number in range(math.prod(sides)):
        rest, box = number, [0]
        steps = [math.prod(sides[i + 1 :]) for i in range(len(sides))]
        for line, step in zip(lines, steps, strict=True):
            place, rest = divmod(rest, step)
            box = [b + step * p for b in box for p in line[place]]
        found.append(box)
    return found
