"""The scan itself: outputs, and the states at the borders of chunks, tile by tile in the order of time."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.chunk.decay import Decay, Decays
from regard.ops.chunk.large_pages import in_large_pages
from regard.ops.chunk.products import of_chunks, scaled, through_decays, write_sums
from regard.ops.chunk.tiles import Run, Tile


class Results(NamedTuple):
    """What a scan writes; the latter two are empty where no gradient will be asked for.

    out [rows, N, E]; end, the states after the last token; starts, those at the starts of tiles, in the order of tiles;
    total, the denominators
    """

    out: Tensor
    end: Tensor
    starts: Tensor
    total: Tensor


def empty_results(run: Run, keep: bool) -> Results:
    out = run.v.new_empty(run.rows, run.n, run.v.shape[2])
    end = run.v.new_empty(run.rows, run.d, run.e, dtype=run.sums)
    starts = sum(tile.heads for tile in run.tiles()) if keep else 0
    total = (run.rows, run.n, 1) if keep and run.ones else (0, 0, 0)
    return Results(out, end, end.new_empty(starts, run.d, run.e), end.new_empty(total))


def scan(run: Run, state: Tensor | None, eps: float, keep: bool, results: Results) -> None:
    """Writes the results. `state` is that before the first token."""
    in_large_pages(results.out)
    decays, at, carry = Decays(run), 0, results.end
    for tile in run.tiles():
        if tile.tokens.start == 0:
            carry = first_state(run, tile, state)
        if keep:
            results.starts[at : at + tile.heads] = carry
            at += tile.heads
        carry = scan_tile(run, tile, decays.of(tile), carry, eps, keep, results)
        if tile.tokens.stop == run.n:
            results.end[tile.rows] = carry


def first_state(run: Run, tile: Tile, state: Tensor | None) -> Tensor:
    if state is None:
        return run.k.new_zeros(tile.heads, run.d, run.e, dtype=run.sums)
    return state[tile.rows].to(run.sums)


def scan_tile(
    run: Run, tile: Tile, decay: Decay, carry: Tensor, eps: float, keep: bool, results: Results
) -> Tensor:
    """Writes the outputs of a tile; the state after it."""
    q, k = run.load("q", run.q, tile), run.load("k", run.k, tile)
    v = run.load("v", run.v, tile, run.ones)
    states = states_before(run, tile, decay, k, v, carry)[1]
    carry = decay.passed(carry, states[:, -1])
    out, reading = run.target("out", results.out, tile, run.e), scaled(run, "reading", q, decay.read, tile)
    torch.bmm(decay.inside.scores(q, k), v, out=out)
    torch.baddbmm(out, reading, of_chunks(run, states[:, :-1]), out=out)
    if run.ones:
        total = out[..., -1:].to(run.sums) + eps
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
        if keep:
            run.store(results.total, tile, total)
    run.store(results.out, tile, out)
    return carry


def states_before(
    run: Run, tile: Tile, decay: Decay, k: Tensor, v: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """(keys as they are written, states before the tile's chunks and after the last [r, S + 1, D, E])."""
    full = run.room("added", tile.heads, tile.count + 1, run.d, run.e)
    full[:, 0] = carry
    written = scaled(run, "written", k, decay.write, tile)
    write_sums(full, slice(1, None), written, v)
    return written, through_decays(run, "states", decay.between, full)
