"""The batched products of a tile, and the states at the borders of its chunks. r rows, S chunks of C tokens each."""

import torch
from torch import Tensor

from regard.ops.chunk.tiles import Tile, Workspace


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of many small matrices: dense copies first, for what is not dense is slow in low precision."""
    return a.contiguous() @ (b.mT.contiguous().mT if b.stride(-2) == 1 else b.contiguous())


def per_row(x: Tensor, tile: Tile) -> Tensor:
    """[r·S, C, D] -> [r, S, C, D], a view."""
    return x.unflatten(0, (tile.heads, tile.count))


def scaled(work: Workspace, name: str, x: Tensor, by: Tensor | None, tile: Tile) -> Tensor:
    """x [r·S, C, D] times a decay [r, S|1, C, 1|D], in scratch; x itself where there is none."""
    if by is None:
        return x
    out = work.buffer(name, *x.shape)
    torch.mul(per_row(x, tile), by, out=per_row(out, tile))
    return out


def write_sums(full: Tensor, at: slice, x: Tensor, y: Tensor) -> None:
    """full[:, at] = xᵀ y of each chunk; full [r, S + 1, D, E]."""
    part = full[:, at]
    if len(full) == 1:
        torch.bmm(x.mT, y, out=part[0])
    else:
        part.copy_(torch.bmm(x.mT, y).view_as(part))


def through_decays(work: Workspace, name: str, between: Tensor, full: Tensor) -> Tensor:
    """T times what each chunk adds, [r, S + 1, D, E]: the states at the borders."""
    r, s, d, e = full.shape
    if len(between) == r:
        return torch.bmm(between, full.view(r, s, -1), out=work.buffer(name, r, s, d * e)).view(full.shape)
    # with gates per channel: one T for each
    out = product(between, full.transpose(1, 2).reshape(r * d, s, e))
    return out.view(r, d, s, e).transpose(1, 2)


def of_chunks(work: Workspace, states: Tensor) -> Tensor:
    """[r, S, D, E] -> [r·S, D, E] as a product reads it."""
    states = states.reshape(-1, *states.shape[2:])
    return states.contiguous() if work.dtype == torch.bfloat16 else states
