"""Gradients of the scan, tile by tile from the last to the first, from the inputs and the states at starts of tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.errors import present
from regard.ops.chunk.decay import LOWEST, Decay, Decays
from regard.ops.chunk.forward import states_before
from regard.ops.chunk.large_pages import in_large_pages
from regard.ops.chunk.products import of_chunks, per_row, scaled, through_decays, write_sums
from regard.ops.chunk.tiles import Tile, Workspace

GATED = "gradients of gates are those of a scan that has gates"


class Saved(NamedTuple):
    """What forward left (see forward.Results), and the gradients that come in: of out, and of the last state."""

    out: Tensor
    total: Tensor
    starts: Tensor
    dout: Tensor
    dend: Tensor


class Gradients(NamedTuple):
    """What is written: gradients of q, k, v, of the gates (empty where not asked for) and of the incoming state."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    state: Tensor


class Loaded(NamedTuple):
    """A tile's queries, keys, values and gradients of outputs, [r·S, C, ..] in the dtype of products."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


def empty_gradients(work: Workspace, gates: bool, dend: Tensor) -> Gradients:
    dq, dk, dv = (t.new_empty(t.shape) for t in (work.q, work.k, work.v))
    dg = torch.zeros_like(present(work.g, GATED)) if gates else work.q.new_empty(0)
    return Gradients(dq, dk, dv, dg, dend.new_empty(dend.shape))


def scan_back(work: Workspace, saved: Saved, gates: bool, gradients: Gradients) -> None:
    """Writes the gradients; those of gates if they are asked for."""
    in_large_pages(gradients.q, gradients.k, gradients.v, gradients.g)
    decays, at, carry = Decays(work), len(saved.starts), saved.dend
    for tile in reversed(work.tiles()):
        if tile.tokens.stop == work.n:
            carry = saved.dend[tile.rows].to(work.sums)
        at -= tile.heads
        start = saved.starts[at : at + tile.heads]
        parts = load(work, tile, saved)
        carry = tile_back(work, tile, decays.of(tile), parts, start, carry, gates, gradients)
        if tile.tokens.start == 0:
            gradients.state[tile.rows] = carry


def load(work: Workspace, tile: Tile, saved: Saved) -> Loaded:
    q, k = work.load("q", work.q, tile), work.load("k", work.k, tile)
    v = work.load("v", work.v, tile, work.ones)
    do = quotient_back(work, tile, saved) if work.ones else work.load("do", saved.dout, tile)
    return Loaded(q, k, v, do)


def quotient_back(work: Workspace, tile: Tile, saved: Saved) -> Tensor:
    """Gradients of the numerators and, last, of the denominator of out: [r·S, C, E + 1]."""
    do, total = work.load("do", saved.dout, tile, ones=True), work.load("total", saved.total, tile)
    none = total == 0
    do.div_(total.masked_fill(none, 1))
    last = (do[..., :-1] * work.load("out", saved.out, tile)).sum(-1, keepdim=True)
    do[..., -1:] = last.masked_fill(none, 0).neg_()
    return do


def tile_back(
    work: Workspace, tile: Tile, decay: Decay, parts: Loaded, start: Tensor, carry: Tensor, gates: bool,
    gradients: Gradients,
) -> Tensor:  # fmt: skip
    """Writes the gradients of a tile with the state `start`; `carry` and what is returned are the gradients of the
    states after and before it."""
    q, k, v, _ = parts
    written, states = states_before(work, tile, decay, k, v, start)
    dstates = state_gradients(work, tile, decay, parts, carry)
    # of the states after each chunk
    after = of_chunks(work, dstates[:, 1:])
    value_gradients(work, tile, decay, parts, written, after, gradients)
    dq, dk, own = key_gradients(work, tile, decay, parts, states, after, gradients, gates)
    before = decay.passed(carry, dstates[:, 0])
    if gates:
        dstates[:, 0] = before
        through = (dstates[:, :-1] * states[:, :-1]).sum(-1)  # [r, S, D]
        gate_gradients(work, tile, per_row(k * dk - q * dq, tile), through, gradients.g)
        dq.addcmul_(own, k)
        dk.addcmul_(own, q)
    work.store(gradients.q, tile, dq)
    work.store(gradients.k, tile, dk)
    return before


def state_gradients(work: Workspace, tile: Tile, decay: Decay, parts: Loaded, carry: Tensor) -> Tensor:
    """[r, S + 1, D, E] of the states at the tile's start and after each of its chunks."""
    full = work.buffer("reading", tile.heads, tile.count + 1, work.d, work.e)
    full[:, -1] = carry
    write_sums(full, slice(None, -1), scaled(work, "read", parts.q, decay.read, tile), parts.do)
    return through_decays(work, "dstates", decay.between.mT, full)


def value_gradients(
    work: Workspace,
    tile: Tile,
    decay: Decay,
    parts: Loaded,
    written: Tensor,
    after: Tensor,
    gradients: Gradients,
) -> None:
    dv = work.target("dv", gradients.v, tile, work.e)
    torch.bmm(decay.inside.scores(parts.q, parts.k).mT, parts.do, out=dv)
    torch.baddbmm(dv, written, after, out=dv)
    work.store(gradients.v, tile, dv[..., : gradients.v.shape[2]])


def key_gradients(
    work: Workspace,
    tile: Tile,
    decay: Decay,
    parts: Loaded,
    states: Tensor,
    after: Tensor,
    gradients: Gradients,
    gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of queries and keys in the dtype of products, and that of each token's weight on itself [r·S, C, 1].

    With `gates` the latter is left out of the former: no gate stands between a token and itself, and the difference
    k dk - q dq, in which it cancels, may be small.
    """
    q, k, v, do = parts
    dq, dk = work.target("dq", gradients.q, tile, work.d), work.target("dk", gradients.k, tile, work.d)
    torch.bmm(do, of_chunks(work, states[:, :-1]).mT, out=dq)
    torch.bmm(v, after.mT, out=dk)
    if decay.read is not None:
        per_row(dq, tile).mul_(decay.read)
        per_row(dk, tile).mul_(decay.write)
    da = torch.bmm(do, v.mT, out=work.buffer("dscores", len(do), tile.padded, tile.padded))
    diagonal = da.diagonal(dim1=1, dim2=2)
    own = diagonal.clone()[..., None]
    if gates:
        diagonal.zero_()
    decay.inside.add_gradients(da, q, k, dq, dk)
    return dq, dk, own


def gate_gradients(work: Workspace, tile: Tile, local: Tensor, through: Tensor, dg: Tensor) -> None:
    """Writes those of a tile's gates, from `local`, k dk - q dq [r, S, C, D], and `through`, S dS at the chunks' starts
    [r, S, D]."""
    gates = present(work.g, GATED)
    if not work.channels:
        local, through = local.sum(-1), through.sum(-1)
    earlier = torch.cat([through[:, :, None], local[:, :, :-1]], dim=2)
    passing = earlier.cumsum(2)
    if dg.dim() == 1:
        row = torch.arange(tile.rows.start, tile.rows.stop, device=dg.device) % work.heads
        dg.index_add_(0, row, passing.sum((1, 2)).to(dg.dtype).masked_fill(gates[row] < LOWEST, 0))
    else:
        passing = passing.flatten(1, 2)[:, : tile.count * tile.size]
        closed = gates[tile.rows, tile.tokens] < LOWEST
        dg[tile.rows, tile.tokens] = passing.masked_fill(closed, 0).to(dg.dtype)
