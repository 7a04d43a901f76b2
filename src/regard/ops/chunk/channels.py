"""What a chunk sees of itself where every channel of the keys has its own gate."""

import torch
from torch import Tensor

from regard.ops.chunk.products import product
from regard.ops.chunk.tiles import Workspace

# log decay in a sub-block; its reference is in the middle, so factors stay in e^-30 .. e^30
SPAN = 60.0


class Channels:
    """A_ts = Σ_d q_td k_sd e^{G_td - G_sd}, G [n, C, D], in float64 where it is large, C a power of two.

    query and key are the decays e^{G_t - r} and e^{r - G_s} about the middle r of a sub-block, levels those about the
    borders between two spans of c tokens, read and write those about the chunk's start and end.
    """

    def __init__(self, work: Workspace, total: Tensor) -> None:
        self.work = work
        n, size, d = total.shape
        self.block = next(c for c in halves(size) if c == 1 or span(total, c) <= SPAN)
        parts = total.view(n, -1, self.block, d)
        middle = (parts[:, :, :1] + parts[:, :, -1:]) / 2
        query = work.buffer("queries", *parts.shape, dtype=work.sums).copy_(parts - middle).exp_()
        key = torch.reciprocal(query, out=work.buffer("keys", *parts.shape, dtype=work.sums))
        first, last = (x.to(work.sums).exp_() for x in (middle, total[:, None, -1:] - middle))
        read, write = query * first, key * last
        self.query, self.key, self.read, self.write = (
            x.view_as(total).to(work.dtype) for x in (query, key, read, write)
        )
        self.levels = self.about_borders(total)

    def about_borders(self, total: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """(c, decays of queries, decays of keys) [n, C / 2c, c, D] of every two spans of c that meet at a border."""
        n, size, d = total.shape
        levels = []
        for c in halves(size // 2) if self.block < size else ():
            if c < self.block:
                break
            first, second = total.view(n, -1, 2, c, d).unbind(2)
            border = first[:, :, -1:]
            queries, keys = second - border, border - first
            queries, keys = (x.to(self.work.sums).exp_().to(self.work.dtype) for x in (queries, keys))
            levels.append((c, queries, keys))
        return levels

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n, c, _ = q.shape
        a = self.work.buffer("scores", n, c, c)
        if self.block == c:
            return torch.bmm(q * self.query, (k * self.key).mT, out=a).tril_()
        a.zero_()
        within = product(self.blocks(q * self.query), self.blocks(k * self.key).mT)
        diagonal(a, self.block).copy_(within.tril_())
        for c, query, key in self.levels:
            diagonal(a, 2 * c)[:, :, c:, :c] = product(half(q, c, 1) * query, (half(k, c, 0) * key).mT)
        return a

    def blocks(self, x: Tensor) -> Tensor:
        """[n, C, D] -> [n, C / block, block, D]"""
        return x.unflatten(1, (-1, self.block))

    def add_gradients(self, da: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Adds the gradients of q and k, given that of A, to dq and dk."""
        within = diagonal(da, self.block).tril()
        dq.add_(product(within, self.blocks(k * self.key)).view_as(q).mul_(self.query))
        dk.add_(product(within.mT, self.blocks(q * self.query)).view_as(k).mul_(self.key))
        for c, query, key in self.levels:
            part = diagonal(da, 2 * c)[:, :, c:, :c]
            half(dq, c, 1).add_(product(part, half(k, c, 0) * key).mul_(query))
            half(dk, c, 0).add_(product(part.mT, half(q, c, 1) * query).mul_(key))


def halves(size: int) -> list[int]:
    """size, size / 2, .., 1"""
    return [size >> i for i in range(size.bit_length())]


def span(total: Tensor, c: int) -> float:
    """The largest fall of log decay from the first to the last token of a sub-block of c."""
    parts = total.unflatten(1, (-1, c))
    return (parts[:, :, 0] - parts[:, :, -1]).amax().item()


def diagonal(a: Tensor, c: int) -> Tensor:
    """[n, C, C] -> its [n, C / c, c, c] blocks on the diagonal, a view."""
    n, size, _ = a.shape
    return a.view(n, size // c, c, size // c, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def half(x: Tensor, c: int, which: int) -> Tensor:
    """[n, C, D] -> the first or second c tokens of every 2c: [n, C / 2c, c, D], a view."""
    return x.unflatten(1, (-1, 2, c))[:, :, which]
