"""The scan out of torch's own operations, a chunk after the other: slower, and differentiable in any way, any times.

For what the tiles have no formula for: forward-mode derivatives, derivatives of derivatives, and torch.func.
"""

import torch
from torch import Tensor

from regard.ops.chunk.decay import LOWEST

# tokens of a chunk: pairs of them, times the channels, are held at once
CHUNK = 16


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    heads: int,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(out [rows, N, E], state [rows, D, E]) of q, k [rows, N, D] and v [rows, N, E]; g as in operators.scan_tiles."""
    dtype, sums = v.dtype, torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    q, k, v = (t.to(torch.promote_types(sums, v.dtype)) for t in (q, k, v))
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if normalise else v
    state = k.new_zeros(len(k), k.shape[2], v.shape[2]) if state is None else state.to(k.dtype)
    gates, outs = per_channel(g, k, heads), []
    for q_c, k_c, v_c, g_c in zip(*(t.split(CHUNK, dim=1) for t in (q, k, v, gates)), strict=True):
        out, state = one_chunk(q_c, k_c, v_c, g_c, state)
        outs.append(out)
    out = torch.cat(outs, dim=1)
    if normalise:
        total = out[..., -1:] + eps
        out = torch.where(total == 0, 0, out[..., :-1] / torch.where(total == 0, 1, total))
    return out.to(dtype), state


def per_channel(g: Tensor | None, k: Tensor, heads: int) -> Tensor:
    """Log decays [rows, N, D|1] in the dtype of k, none below LOWEST."""
    if g is None:
        return k.new_zeros(*k.shape[:2], 1)
    if g.dim() == 1:
        g = g.repeat(len(k) // heads)[:, None].expand(-1, k.shape[1])
    return (g if g.dim() == 3 else g[..., None]).to(k.dtype).clamp(min=LOWEST)


def one_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out [rows, C, E], the state after it)."""
    t = torch.arange(q.shape[1], device=q.device)
    later, seen = ((t[:, None] - t >= least)[..., None] for least in (1, 0))
    # the gates after s up to t, each pair its own sum: [rows, C, C, D|1]
    between = torch.where(later, g[:, :, None], 0).cumsum(1)
    weights = torch.where(seen, between.exp(), 0)
    inside = (q[:, :, None] * k[:, None] * weights).sum(-1)
    read = g.cumsum(1).exp()
    out = inside @ v + (q * read) @ state
    return out, read[:, -1, :, None] * state + (k * between[:, -1].exp()).mT @ v
