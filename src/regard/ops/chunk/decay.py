"""The decays of a tile: within its chunks, between them, and over the whole of it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.chunk.channels import Channels
from regard.ops.chunk.tiles import Tile, Workspace

# what lies below counts as this: a factor of 1e-26
LOWEST = -60.0
# sums of log decay beyond this are held in float64, lest their differences lose digits
SMALL = 8.0


class Pairs:
    """A = (q kᵀ) ⊙ W, W [r, S|1, C, C]: what a chunk sees of itself where a gate is one number per token."""

    def __init__(self, work: Workspace, weights: Tensor) -> None:
        self.work, self.weights = work, weights

    def weigh(self, a: Tensor) -> Tensor:
        a.view(self.weights.shape[0], -1, *a.shape[1:]).mul_(self.weights)
        return a

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n, c, _ = q.shape
        return self.weigh(torch.bmm(q, k.mT, out=self.work.buffer("scores", n, c, c)))

    def add_gradients(self, da: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Adds the gradients of q and k, given that of A, to dq and dk. da is changed."""
        da = self.weigh(da)
        torch.baddbmm(dq, da, k, out=dq)
        torch.baddbmm(dk, da.mT, q, out=dk)


@dataclass
class Decay:
    """Decays of a tile, broadcast over r rows and S chunks, in the dtype of products.

    read     [r, S|1, C, 1|D] from a chunk's start to a query; None: no decay
    write    [r, S|1, C, 1|D] from a key to the chunk's end; None: no decay
    inside   what a chunk sees of itself
    between  T [r, S + 1, S + 1], or [r·D, ..] with gates per channel; what it says of S -> end is in `whole`
    whole    [r, 1|D, 1] from the tile's start to its end, for the state in full precision; None: no decay
    """

    read: Tensor | None
    write: Tensor | None
    inside: Pairs | Channels
    between: Tensor
    whole: Tensor | None

    def passed(self, state: Tensor, more: Tensor) -> Tensor:
        """The state at the tile's other end: what came in, decayed, and what the tile adds; in full precision."""
        kept = state.clone() if self.whole is None else state * self.whole
        return kept.add_(more)


class Decays:
    """The decays of a run's tiles. Fixed ones are made once for all tiles of the same heads and size."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.known: dict[tuple, Decay] = {}

    def of(self, tile: Tile) -> Decay:
        g, heads = self.work.g, self.work.heads
        if g is not None and g.dim() > 1:
            return gated(self.work, g, tile)
        key = (g is not None and tile.rows.start % heads, tile.heads, tile.count, tile.size)
        if key not in self.known:
            self.known[key] = fixed(self.work, tile)
        return self.known[key]


def fixed(work: Workspace, tile: Tile) -> Decay:
    """No decay, or one per head."""
    t = torch.arange(max(tile.size, tile.count) + 1, dtype=torch.float64, device=work.device)
    if work.g is None:
        g = t.new_zeros(tile.heads, 1, 1)
    else:
        row = torch.arange(tile.rows.start, tile.rows.stop, device=work.device)
        g = work.g.double().clamp(min=LOWEST)[row % work.heads, None, None]
    decay = from_sums(work, g * t[1 : tile.size + 1], g[:, 0] * tile.size * t[: tile.count + 1])
    return Decay(None, None, decay.inside, decay.between, None) if work.g is None else decay


def gated(work: Workspace, gates: Tensor, tile: Tile) -> Decay:
    """A decay per token, or per token and channel."""
    g = gates[tile.rows, tile.tokens].to(work.sums).clamp(min=LOWEST)
    g = F.pad(g, (0, 0, 0, tile.pad)) if tile.pad else g
    g = g.unflatten(1, (tile.count, tile.padded))
    inside = g.cumsum(2)  # [r, S, C] or [r, S, C, D]
    # bfloat16 products would round those digits away
    if work.dtype != torch.bfloat16 and inside[:, :, -1].amin() < -SMALL:
        inside = g.double().cumsum(2)
    ends = inside[:, :, -1].double().cumsum(1)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends], dim=1)  # [r, S + 1] or [r, S + 1, D]
    return from_sums(work, inside, ends.transpose(1, -1) if work.channels else ends)


def from_sums(work: Workspace, inside: Tensor, ends: Tensor) -> Decay:
    """From sums of log decay within chunks, [r, S|1, C] or [r, S, C, D], and over chunks, [r, (D,) S + 1].

    Sums are in float64 where they are large, as a difference of two keeps the digits of the larger.
    """
    between = between_pairs(work, ends)
    between[..., -1, 0] = 0
    whole = ends[..., -1].to(work.sums).exp().reshape(len(ends), -1, 1)
    if work.channels:
        within = Channels(work, inside.flatten(0, 1))
        read, write = (x.unflatten(0, inside.shape[:2]) for x in (within.read, within.write))
    else:
        within, sums = Pairs(work, between_pairs(work, inside)), inside[..., None]
        read, write = (x.to(work.sums).exp_().to(work.dtype) for x in (sums, sums[:, :, -1:] - sums))
    return Decay(read, write, within, between.flatten(0, -3), whole)


def between_pairs(work: Workspace, total: Tensor) -> Tensor:
    """[.., C, C] e^{total_t - total_s} for s <= t, zero above; total in float64 as its high and its low digits."""
    high = total.to(work.sums)
    difference = high[..., :, None] - high[..., None, :]
    if total.dtype != work.sums:
        low = (total - high).to(work.sums)
        difference.add_(low[..., :, None]).sub_(low[..., None, :])
    return difference.add_(work.above_diagonal(total.shape[-1])).exp_().to(work.dtype)
