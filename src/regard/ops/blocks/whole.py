"""Attention over all keys with the logarithm of its sum, both differentiable: a part that others are merged with.

On a CPU the forward is torch's fused kernel on the tensors as they lie, nothing is gathered; the backward is that of
block attention over a list of all blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.blocks.attention import block_attention, gathered_back
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.merged import Part
from regard.ops.precision import as_written
from regard.ops.softmax import at_least_float32, per_query_head
from regard.ops.transforms import transformed

TILE = 256  # queries and keys of a block; changes the speed, never the result


def whole_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> Part:
    """(out [B, H, n, E], lse [B, H, n]) in float32 at least; causal: the last query is that of the last key."""
    if transformed(q, k, v):
        raise NotImplementedError(
            "attention with its sums under torch.func, or a forward-mode derivative of it"
        )
    n, m = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and not (causal and n < m):
        width = max(q.shape[-1], v.shape[-1])
        wide = [F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v)]
        out, lse = whole(*wide, causal, scale)
        return at_least_float32(out[..., : v.shape[-1]]), lse
    out, lse = block_attention(
        q, k, v, every_block(n, m, causal, q.device), scale=scale, causal=causal, start=m - n if causal else 0
    )
    return at_least_float32(out), lse


def every_block(n: int, m: int, causal: bool, device: torch.device) -> Blocks:
    i, j = (torch.arange(-(-size // TILE), device=device) for size in (n, m))
    seen = (j * TILE < m - n + (i[:, None] + 1) * TILE) | (not causal)
    return Blocks.of_map(seen[None, None], TILE, TILE)


@torch.library.custom_op("regard::whole", mutates_args=())
@as_written
def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """All keys, of tensors of one width."""
    k, v = (per_query_head(t, q.shape[1]).expand(-1, q.shape[1], -1, -1) for t in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.contiguous(), lse.contiguous()


@whole.register_fake
def _(q, k, v, causal, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format), at_least_float32(q).new_empty(
        q.shape[:3]
    )


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, dout, dlse):
    """Gradients of the arguments of `whole`, in their order."""
    q, k, v, out, lse = ctx.saved_tensors
    index = every_block(q.shape[2], k.shape[2], ctx.causal, q.device).index
    start, length = (torch.full((len(q),), size, device=q.device) for size in (0, k.shape[2]))
    grads = gathered_back(q, k, v, index, None, None, start, length, out, lse, dout, dlse, TILE, TILE, ctx.causal,
                          ctx.scale)  # fmt: skip
    return *grads, None, None


whole.register_autograd(backward, setup_context=setup_context)
