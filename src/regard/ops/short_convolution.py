"""A short causal depth-wise convolution of tokens [B, H, N, D] that passes over hidden ones.

out_i = Σ_s w_s ⊙ t_{i-s} + b        s = 0 .. kernel - 1; t_{-1}, t_{-2}, ... are the tail, zeros at the start
"""

import torch
from torch import Tensor

from regard.ops.softmax import at_least_float32

Order = tuple[Tensor, Tensor, Tensor]


def closed_up(mask: Tensor) -> Order:
    """The order of tokens [.., n] with hidden ones behind, each one's place in it, and how many are there [.., 1]."""
    order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    return order, order.argsort(dim=-1), mask.sum(-1, keepdim=True)


def short_convolution(
    t: Tensor, tail: Tensor, w: Tensor, bias: Tensor, order: Order | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, D] in the dtype of t with its sums in float32, the tail [B, H, kernel - 1, D] of what follows).

    w [D, kernel], w[:, s] for the token s places back; `order` is that of a mask [B|1, H|1, N], None where all are
    there. What comes out at a hidden token is of no meaning.
    """
    n, back = t.shape[2], tail.shape[2]
    t = t if order is None else t.gather(2, wide(order[0], t))
    line = torch.cat([tail, t], dim=2)
    x, w = at_least_float32(line), at_least_float32(w)
    out = sum((x[:, :, back - s : back - s + n] * w[:, s] for s in range(back + 1)), at_least_float32(bias))
    out = out.to(t.dtype)
    if order is None:
        return out, line[:, :, n:]
    last = order[2] + torch.arange(back, device=t.device)
    return out.gather(2, wide(order[1], out)), line.gather(2, wide(last, line))


def wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens [B|1, H|1, n] for all batch rows, heads and channels of `like`."""
    return index[..., None].expand(*like.shape[:2], -1, like.shape[3])
