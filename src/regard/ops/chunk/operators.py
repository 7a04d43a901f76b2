"""The scan and its gradients as operators of torch.library, and the function that is called."""

import torch
from torch import Tensor

from regard.ops.chunk.backward import Saved, empty_gradients, scan_back
from regard.ops.chunk.forward import empty_results, scan
from regard.ops.chunk.tiles import Workspace
from regard.ops.precision import as_written


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *, chunk: int,
    normalise: bool = False, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, N, E] in v's dtype, state [B, H, D, E]) of q, k [B, H, N, D] and v [B, H, N, E].

    g is None, [H], or broadcasts to [B, H, N] or [B, H, N, D]; below LOWEST it counts as LOWEST. With normalise, out
    is divided by what it would be with values of 1 (+ eps), and the state is [B, H, D, E + 1]: that sum is its last
    column.
    """
    b, h, n, d = k.shape
    if g is not None and g.dim() > 1:
        g = g.expand(b, h, n, *((d,) if g.dim() == 4 else ())).flatten(0, 1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    state = None if state is None else state.expand(b, h, -1, -1).flatten(0, 1)
    inputs = [t for t in (q, k, v, g, state) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, end, _, _ = scan_tiles(q, k, v, g, state, h, chunk, normalise, eps, keep)
    return out.unflatten(0, (b, h)), end.unflatten(0, (b, h))


@torch.library.custom_op("regard::scan_tiles", mutates_args=())
@as_written
def scan_tiles(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, heads: int, chunk: int,
    normalise: bool, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, state, states at the starts of tiles, denominators); the latter two are empty unless `keep`."""
    work = Workspace(q, k, v, g, heads, chunk, normalise)
    results = empty_results(work, keep)
    scan(work, state, eps, keep, results)
    return (*results,)


@scan_tiles.register_fake
def _(q, k, v, g, state, heads, chunk, normalise, eps, keep):
    return tuple(empty_results(Workspace(q, k, v, g, heads, chunk, normalise), keep))


@torch.library.custom_op("regard::scan_tiles_back", mutates_args=())
@as_written
def scan_tiles_back(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, out: Tensor, total: Tensor, starts: Tensor, dout: Tensor,
    dend: Tensor, heads: int, chunk: int, normalise: bool, gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and the incoming state; that of g is empty unless `gates`."""
    # the gradient of a gate, q dq - k dk, is small between large numbers
    work = Workspace(q, k, v, g, heads, chunk, normalise, precise=gates)
    gradients = empty_gradients(work, gates, dend)
    scan_back(work, Saved(out, total, starts, dout, dend), gates, gradients)
    return (*gradients,)


@scan_tiles_back.register_fake
def _(q, k, v, g, out, total, starts, dout, dend, heads, chunk, normalise, gates):
    return tuple(empty_gradients(Workspace(q, k, v, g, heads, chunk, normalise), gates, dend))


def setup_context(ctx, inputs, output) -> None:
    q, k, v, g, _, ctx.heads, ctx.chunk, ctx.normalise, *_ = inputs
    out, _, starts, total = output
    ctx.save_for_backward(q, k, v, g, out, total, starts)


def backward(ctx, dout, dend, dstarts, dtotal):
    """Gradients of the arguments of scan_tiles, in their order."""
    gates, incoming = ctx.needs_input_grad[3:5]
    dq, dk, dv, dg, dstate = scan_tiles_back(
        *ctx.saved_tensors, dout, dend, ctx.heads, ctx.chunk, ctx.normalise, gates
    )
    return dq, dk, dv, dg if gates else None, dstate if incoming else None, *(None,) * 5


scan_tiles.register_autograd(backward, setup_context=setup_context)
