"""The scan itself: outputs, and the states at the borders of chunks, tile by tile in the order of time."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.chunk.decay import Decay, Decays
from regard.ops.chunk.large_pages import in_large_pages
from regard.ops.chunk.products import of_chunks, scaled, through_decays, write_sums
from regard.ops.chunk.tiles import Tile, Workspace


class Results(NamedTuple):
    """What a scan writes; the latter two are empty where no gradient will be asked for.

    out [rows, N, E]; end, the states after the last token; starts, those at the starts of tiles, in the order of tiles;
    total, the denominators
    """

    out: Tensor
    end: Tensor
    starts: Tensor
    total: Tensor


def empty_results(work: Workspace, keep: bool) -> Results:
    out = work.v.new_empty(work.rows, work.n, work.v.shape[2])
    end = work.v.new_empty(work.rows, work.d, work.e, dtype=work.sums)
    starts = sum(tile.heads for tile in work.tiles()) if keep else 0
    total = (work.rows, work.n, 1) if keep and work.ones else (0, 0, 0)
    return Results(out, end, end.new_empty(starts, work.d, work.e), end.new_empty(total))


def scan(work: Workspace, state: Tensor | None, eps: float, keep: bool, results: Results) -> None:
    """Writes the results. `state` is that before the first token."""
    in_large_pages(results.out)
    decays, at, carry = Decays(work), 0, results.end
    for tile in work.tiles():
        if tile.tokens.start == 0:
            carry = first_state(work, tile, state)
        if keep:
            results.starts[at : at + tile.heads] = carry
            at += tile.heads
        carry = scan_tile(work, tile, decays.of(tile), carry, eps, keep, results)
        if tile.tokens.stop == work.n:
            results.end[tile.rows] = carry


def first_state(work: Workspace, tile: Tile, state: Tensor | None) -> Tensor:
    if state is None:
        return work.k.new_zeros(tile.heads, work.d, work.e, dtype=work.sums)
    return state[tile.rows].to(work.sums)


def scan_tile(
    work: Workspace, tile: Tile, decay: Decay, carry: Tensor, eps: float, keep: bool, results: Results
) -> Tensor:
    """Writes the outputs of a tile; the state after it."""
    q, k = work.load("q", work.q, tile), work.load("k", work.k, tile)
    v = work.load("v", work.v, tile, work.ones)
    states = states_before(work, tile, decay, k, v, carry)[1]
    carry = decay.passed(carry, states[:, -1])
    out, reading = work.target("out", results.out, tile, work.e), scaled(work, "reading", q, decay.read, tile)
    torch.bmm(decay.inside.scores(q, k), v, out=out)
    torch.baddbmm(out, reading, of_chunks(work, states[:, :-1]), out=out)
    if work.ones:
        total = out[..., -1:].to(work.sums) + eps
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
        if keep:
            work.store(results.total, tile, total)
    work.store(results.out, tile, out)
    return carry


def states_before(
    work: Workspace, tile: Tile, decay: Decay, k: Tensor, v: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """(keys as they are written, states before the tile's chunks and after the last [r, S + 1, D, E])."""
    full = work.buffer("added", tile.heads, tile.count + 1, work.d, work.e)
    full[:, 0] = carry
    written = scaled(work, "written", k, decay.write, tile)
    write_sums(full, slice(1, None), written, v)
    return written, through_decays(work, "states", decay.between, full)
