"""The tiles of one call: which rows and tokens stand in each, and the scratch in which their products are made."""

from typing import NamedTuple

import torch
from torch import Tensor

# numbers in the queries or values of a tile, by bytes of a number
TILE = {2: 1 << 18, 4: 1 << 17, 8: 1 << 15}
# the same where inputs of two bytes are widened in scratch
WIDENED = 1 << 16
# chunks in a tile: T grows with their square, and with gates per channel there are D of them
MOST, FEW = 64, 32
# tokens of a chunk with gates per channel
CHANNELS = 64


class Tile(NamedTuple):
    """Rows (heads of all texts in one line) and the tokens of `count` chunks of `size`; `pad` is 0 or what ends one."""

    rows: slice
    tokens: slice
    count: int
    size: int
    pad: int

    @property
    def heads(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def padded(self) -> int:
        """Tokens of a chunk in scratch."""
        return self.size + self.pad


class Workspace:
    """What the tiles of one call share: its inputs, their shapes and dtypes, buffers for products.

    `ones` adds a column of 1 to the values, whose sum is the denominator; `low` takes products in bfloat16, as the
    inputs are, and `precise` in the dtype of sums all the same.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, heads: int, chunk: int, ones: bool,
        low: bool = False, precise: bool = False,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.g = q, k, v, g
        self.rows, self.n, self.d = k.shape
        self.ones, self.e, self.heads = ones, v.shape[2] + ones, heads
        self.channels = g is not None and g.dim() == 3
        self.chunk = min(CHANNELS if self.channels else chunk, self.n)
        self.inputs = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        self.sums = torch.promote_types(self.inputs, torch.float32)
        self.tile = TILE[self.inputs.itemsize] if low or self.inputs.itemsize > 2 else WIDENED
        self.dtype = self.inputs if low and not precise else self.sums
        self.device = k.device
        self.scratch: dict[tuple, Tensor] = {}

    def tiles(self) -> list[Tile]:
        """In the order of time: many chunks of one row, or many rows where texts are short."""
        per = max(1, self.tile // (self.chunk * max(self.d, self.e)))
        full = self.n // self.chunk
        count = max(1, min(full, per, FEW if self.channels else MOST))
        together = max(1, per // count) if count == full else 1
        tiles = []
        for row in range(0, self.rows, together):
            rows = slice(row, min(row + together, self.rows))
            for i in range(0, full, count):
                some = min(count, full - i)
                tokens = slice(i * self.chunk, (i + some) * self.chunk)
                tiles.append(Tile(rows, tokens, some, self.chunk, self.missing(self.chunk)))
            if rest := self.n % self.chunk:
                tiles.append(Tile(rows, slice(self.n - rest, self.n), 1, rest, self.missing(rest)))
        return tiles

    def missing(self, size: int) -> int:
        """With gates per channel a chunk is halved down to sub-blocks, so it is padded to a power of two."""
        return (1 << (size - 1).bit_length()) - size if self.channels else 0

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch by name and shape."""
        dtype = dtype or self.dtype
        key = (name, shape, dtype)
        if key not in self.scratch:
            self.scratch[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.scratch[key]

    def above_diagonal(self, size: int) -> Tensor:
        """[size, size] with -inf above the diagonal and 0 elsewhere."""
        key = ("above", size)
        if key not in self.scratch:
            full = torch.full((size, size), -torch.inf, dtype=self.sums, device=self.device)
            self.scratch[key] = full.triu(1)
        return self.scratch[key]

    def direct(self, t: Tensor, tile: Tile, width: int) -> Tensor | None:
        """[r·S, C, width] of a tile as products can read or write it where it lies, or None."""
        part = t[tile.rows, tile.tokens]
        if t.dtype != self.dtype or t.shape[2] != width or tile.pad:
            return None
        if part.is_contiguous():
            return part.view(-1, tile.size, width)
        dense = self.dtype == torch.bfloat16 or part.stride(2) != 1 or part.stride(1) < width
        return None if dense or tile.heads > 1 else part[0].unflatten(0, (tile.count, tile.size))

    def load(self, name: str, t: Tensor, tile: Tile, ones: bool = False) -> Tensor:
        """[r·S, C, ..] of a tile for reading, in the dtype of products; `ones` adds a last column of 1."""
        width = t.shape[2] + ones
        part = self.direct(t, tile, width)
        if part is not None:
            return part
        copy = self.buffer(name, tile.heads * tile.count, tile.padded, width)
        lines, tokens = copy.view(tile.heads, -1, width), tile.count * tile.size
        lines[:, :tokens, : t.shape[2]].copy_(t[tile.rows, tile.tokens])
        if ones:
            lines[:, :tokens, -1] = 1
        if tile.pad:
            lines[:, tokens:] = 0
        return copy

    def target(self, name: str, t: Tensor, tile: Tile, width: int) -> Tensor:
        """[r·S, C, width] to write a tile's result to; `store` then brings it to t, if it is not there."""
        part = self.direct(t, tile, width) if t.is_contiguous() else None
        return self.buffer(name, tile.heads * tile.count, tile.padded, width) if part is None else part

    def store(self, t: Tensor, tile: Tile, value: Tensor) -> None:
        part = t[tile.rows, tile.tokens]
        if value.data_ptr() != part.data_ptr():
            part.copy_(value.view(tile.heads, -1, value.shape[2])[:, : tile.count * tile.size])
