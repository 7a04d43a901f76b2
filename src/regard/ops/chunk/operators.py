"""The scan and its gradients as operators of torch.library, and the function that is called."""

import torch
from torch import Tensor

from regard.ops.chunk.backward import Saved, empty_gradients, scan_back
from regard.ops.chunk.composed import composed
from regard.ops.chunk.forward import empty_results, scan
from regard.ops.chunk.tiles import Workspace
from regard.ops.machine import product_dtype_of
from regard.ops.precision import as_written
from regard.ops.transforms import transformed


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
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    low = product_dtype_of(dtype, k.device.type) == torch.bfloat16
    if transformed(*inputs):
        out, end = composed(q, k, v, g, state, h, normalise, eps)
    else:
        out, end, _, _ = scan_tiles(q, k, v, g, state, h, chunk, normalise, eps, low, keep)
    return out.unflatten(0, (b, h)), end.unflatten(0, (b, h))


@torch.library.custom_op("regard::scan_tiles", mutates_args=())
@as_written
def scan_tiles(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, heads: int, chunk: int,
    normalise: bool, eps: float, low: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, state, states at the starts of tiles, denominators); the latter two are empty unless `keep`.

    `low`: products are in bfloat16, which is decided before, once for both directions and for a graph that is traced.
    """
    work = Workspace(q, k, v, g, heads, chunk, normalise, low)
    results = empty_results(work, keep)
    scan(work, state, eps, keep, results)
    return (*results,)


@scan_tiles.register_fake
def _(q, k, v, g, state, heads, chunk, normalise, eps, low, keep):
    return tuple(empty_results(Workspace(q, k, v, g, heads, chunk, normalise, low), keep))


@torch.library.custom_op("regard::scan_tiles_back", mutates_args=())
@as_written
def scan_tiles_back(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, out: Tensor, total: Tensor,
    starts: Tensor, dout: Tensor, dend: Tensor, heads: int, chunk: int, normalise: bool, eps: float, low: bool,
    gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and the incoming state; that of g is empty unless `gates`."""
    # the gradient of a gate, a sum of k dk - q dq, may be small between large numbers
    work = Workspace(q, k, v, g, heads, chunk, normalise, low, precise=gates)
    gradients = empty_gradients(work, gates, dend)
    scan_back(work, Saved(out, total, starts, dout, dend), gates, gradients)
    return (*gradients,)


@scan_tiles_back.register_fake
def _(q, k, v, g, state, out, total, starts, dout, dend, heads, chunk, normalise, eps, low, gates):
    return tuple(empty_gradients(Workspace(q, k, v, g, heads, chunk, normalise, low), gates, dend))


def setup_context(ctx, inputs, output) -> None:
    q, k, v, g, state, ctx.heads, ctx.chunk, ctx.normalise, ctx.eps, ctx.low, _ = inputs
    out, _, starts, total = output
    ctx.save_for_backward(q, k, v, g, state, out, total, starts)


def backward(ctx, dout, dend, dstarts, dtotal):
    """Gradients of the arguments of scan_tiles, in their order."""
    gates, incoming = ctx.needs_input_grad[3:5]
    dq, dk, dv, dg, dstate = scan_tiles_back(
        *ctx.saved_tensors, dout, dend, ctx.heads, ctx.chunk, ctx.normalise, ctx.eps, ctx.low, gates
    )
    return dq, dk, dv, dg if gates else None, dstate if incoming else None, *(None,) * 6


scan_tiles.register_autograd(backward, setup_context=setup_context)


def setup_context_again(ctx, inputs, output) -> None:
    q, k, v, g, state, _, _, _, dout, dend, ctx.heads, _, ctx.normalise, ctx.eps, _, ctx.gates = inputs
    ctx.save_for_backward(q, k, v, g, state, dout, dend)


def backward_again(ctx, *wanted):
    """Gradients of the arguments of scan_tiles_back, in their order: of the composed scan, differentiated twice.

    What forward left (out, total, starts) follows from the other arguments, which have its share.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [None if t is None else apart(t) for t in ctx.saved_tensors]
        *inputs, dout, dend = tensors
        results = composed(*inputs, ctx.heads, ctx.normalise, ctx.eps)
        known = [i for i, t in enumerate(inputs) if t is not None and (i != 3 or ctx.gates)]
        first = torch.autograd.grad(results, [inputs[i] for i in known], (dout, dend), create_graph=True)
        asked = [t for t in tensors if t is not None]
        second = torch.autograd.grad(
            first, asked, [wanted[i].to(f.dtype) for i, f in zip(known, first, strict=True)],
            allow_unused=True, create_graph=create,
        )  # fmt: skip
    found = iter(second)
    *inputs, dout, dend = (None if t is None else next(found) for t in tensors)
    return *inputs, None, None, None, dout, dend, *(None,) * 6


def apart(t: Tensor) -> Tensor:
    """The tensor as a place of its own in the graph, so that no argument is reached through another."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


scan_tiles_back.register_autograd(backward_again, setup_context=setup_context_again)
