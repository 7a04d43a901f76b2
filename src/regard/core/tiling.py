"""The tiles of a mask, found without asking every pair: a rule says for whole tiles what it can, the rest is looked at.

A predicate may have a rule of tiles, `rule(at: Tiles, **settings) -> (some, all)`: whether any pair of the tile may be
seen, and whether every pair surely is. `some` may be too large and `all` too small; what lies between is evaluated pair
by pair, those tiles only. `&`, `|` and `~` compose the two like the predicates themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.coordinates import Coordinates, Sides, Tiles

PAIRS = 1 << 22  # pairs looked at together; bounds the memory, never changes the result


@dataclass(frozen=True, eq=False)
class Question:
    """Which tiles of block_q queries and block_k keys a mask leaves empty, partial or full."""

    mask: Any  # a Lowering
    n: int
    m: int
    block_q: int
    block_k: int
    offset: int
    sides: Sides
    device: Any = None

    def cover(self) -> tuple[Tensor, Tensor]:
        """(some, all) [B or 1, H or 1, I, J] by rules of tiles; where there are none everything is open."""
        b = torch.arange(self.mask._batch(self.sides, None), device=self.device).view(-1, 1, 1, 1)
        h = torch.arange(self.mask.heads or 1, device=self.device).view(1, -1, 1, 1)
        q0 = torch.arange(0, self.n, self.block_q, device=self.device).view(1, 1, -1, 1)
        k0 = torch.arange(0, self.m, self.block_k, device=self.device).view(1, 1, 1, -1)
        q1, k1 = (q0 + self.block_q).clamp(max=self.n) - 1, (k0 + self.block_k).clamp(max=self.m) - 1
        shape = len(b), h.shape[1], q0.shape[2], k0.shape[3]
        found = self.mask.cover(Tiles(b, h, q0 + self.offset, q1 + self.offset, k0, k1, self.sides))
        if found is None:
            none = torch.zeros(shape, dtype=torch.bool, device=self.device)
            return ~none, none
        some, every = (part.expand(shape) for part in found)
        return some, every

    def pairs(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(seen, real) [T, block_q, block_k] bool of tiles [T, 4] (b, h, I, J); pairs beyond the text are not real."""
        b, h, i, j = tiles[:, :, None, None].unbind(1)
        q = i * self.block_q + torch.arange(self.block_q, device=tiles.device)[:, None]
        k = j * self.block_k + torch.arange(self.block_k, device=tiles.device)
        real = (q < self.n) & (k < self.m)
        at = Coordinates(b, h, q.clamp(max=self.n - 1) + self.offset, k.clamp(max=self.m - 1), self.sides)
        return self.mask(at) & real, real

    def open(self, some: Tensor, every: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(tiles [T, 4], seen, real) of those that no rule settles, a part at a time."""
        tiles = (some & ~every).nonzero()
        for part in tiles.split(max(1, PAIRS // (self.block_q * self.block_k))):
            yield part, *self.pairs(part)

    def kinds(self) -> Tensor:
        """[B or 1, H or 1, I, J] int8: 0 empty, 1 partial, 2 full."""
        some, every = self.cover()
        kind = every.to(torch.int8) * 2
        for tiles, seen, real in self.open(some, every):
            count = seen.sum((1, 2))
            kind[tuple(tiles.T)] = (count > 0).to(torch.int8) + (count == real.sum((1, 2))).to(torch.int8)
        return kind

    def tiled(self, most: float) -> "Tiled | None":
        """The tiles that are read, and the masks inside the partial ones; None where more than `most` are read."""
        some, every = self.cover()
        room = most * some.numel()
        kind, found, numbers = every.to(torch.int8) * 2, [], torch.full(some.shape, -1, device=some.device)
        for tiles, seen, real in self.open(some, every):
            count = seen.sum((1, 2))
            full = count == real.sum((1, 2))
            kind[tuple(tiles.T)] = (count > 0).to(torch.int8) + full.to(torch.int8)
            partial = (count > 0) & ~full
            numbers[tuple(tiles[partial].T)] = sum(map(len, found)) + torch.arange(
                int(partial.sum()), device=some.device
            )
            found.append(seen[partial])
            if sum(map(len, found)) > room:
                return None
        if (kind > 0).sum() > room:
            return None
        tables = torch.cat(found) if found else None
        if tables is None or not len(tables):
            return Tiled(kind > 0, None, None)
        one, tables = alike(tables)
        return Tiled(kind > 0, torch.where(numbers >= 0, one[numbers.clamp(min=0)], -1), tables)


@dataclass(frozen=True, eq=False)
class Tiled:
    """A mask as tiles: read [B or 1, H or 1, I, J] bool, and which of tables [T, block_q, block_k] holds inside each.

    tile [.., I, J], -1: the whole tile is seen; both are None where that is so of all.
    """

    read: Tensor
    tile: Tensor | None
    tables: Tensor | None


def alike(tables: Tensor) -> tuple[Tensor, Tensor]:
    """(number [T] of each table among those that differ, these [U, ...]) of bool tables [T, ...]."""
    flat = tables.flatten(1)
    mark = torch.randint(-(2**40), 2**40, flat.shape[1:], generator=torch.Generator().manual_seed(0))
    keys = flat.long() @ mark.to(flat.device) if len(flat) else flat.new_zeros(0, dtype=torch.long)
    _, number, count = torch.unique(keys, return_inverse=True, return_counts=True)
    first = torch.empty(len(count), dtype=torch.long, device=flat.device)
    first.scatter_(0, number, torch.arange(len(flat), device=flat.device))
    if bool((tables == tables[first][number]).all()):
        return number, tables[first]
    # two that differ under one key: each keeps its own
    return torch.arange(len(flat), device=flat.device), tables
