"""Softmax attention of the heads that tokens have chosen: KV heads that nobody asks are not read."""

from itertools import groupby

from torch import Tensor, cat

from regard.ops.softmax import softmax_attention
from regard.ops.transforms import asks_values

LONG = 1024  # keys from which on heads that are not chosen are worth leaving out: changes the speed only


def attend_chosen(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, mask: Tensor | None, causal: bool
) -> Tensor:
    """[B, H, N, E] of q [B, H, N, D] on k, v [B, G, M, D|E]; chosen [B, H, N] bool.

    KV heads of which no token of the call has chosen a head give zeros. A prompt chooses every head somewhere, so they
    are looked for in steps of one token only.
    """
    scale, groups, each = q.shape[3] ** -0.5, k.shape[1], q.shape[1] // k.shape[1]
    used = [True] * groups
    if q.shape[2] == 1 and k.shape[2] >= LONG and groups > 1 and asks_values():
        used = chosen.any(-1).any(0).view(groups, each).any(-1).tolist()
    parts, start = [], 0
    for wanted, run in groupby(used):
        stop = start + len(list(run))
        heads, keys = slice(start * each, stop * each), slice(start, stop)
        if wanted:
            seen = mask
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
                seen = mask[:, heads]
            out = softmax_attention(
                q[:, heads], k[:, keys], v[:, keys], scale=scale, mask=seen, causal=causal
            )
        else:
            out = v.new_zeros(q.shape[0], (stop - start) * each, q.shape[2], v.shape[3])
        parts.append(out)
        start = stop
    return cat(parts, 1) if len(parts) > 1 else parts[0]
