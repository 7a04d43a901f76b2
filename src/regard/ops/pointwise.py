"""Attention whose weights are a function of each score, in blocks of rows: no N × M matrix is ever held."""

from collections.abc import Callable

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.softmax import mix, row_blocks, scores

Weigh = Callable[[Tensor, Tensor | None], Tensor]


def pointwise_attention(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, weigh: Weigh) -> Tensor:
    """[B, H, N, E] in v's dtype, v's weights given by weigh(s, seen) of a block of rows.

    s [B, H, R, M] are scaled scores in float32 at least, seen is bool and broadcasts to them, None: all are. Weights of
    keys that are not seen have to be zero. In causal_self a block ends at the key of its last query.
    """
    (batch, heads, n, _), m, parts = q.shape, k.shape[2], []
    causal = call.pattern == "causal_self"
    for rows in row_blocks(n, batch * heads * m):
        keys = slice(m - n + rows.stop if causal else m)
        s = scores(q[:, :, rows], k[:, :, keys], scale)
        parts.append(mix(weigh(s, seen_by(call, rows, n, m, keys, q.device)), v[:, :, keys]))
    return torch.cat(parts, dim=2) if len(parts) != 1 else parts[0]


def seen_by(
    call: Call, rows: slice, n: int, m: int, keys: slice, device: torch.device | None = None
) -> Tensor | None:
    """[B|1, H|1, R, M'] bool: which of the first M' keys a block of rows sees; the last query is at the last key."""
    seen = None if call.key_mask is None else call.key_mask[:, :, None, keys]
    if call.pair_mask is not None:
        pairs = call.pair_mask[:, :, rows, keys]
        seen = pairs if seen is None else seen & pairs
    if call.pattern != "causal_self" or rows.stop - rows.start == 1:
        return seen
    place = torch.arange(rows.start, rows.stop, device=device)[:, None] + (m - n)
    lower = torch.arange(keys.stop, device=device) <= place
    return lower if seen is None else seen & lower


def keys_seen(s: Tensor, seen: Tensor | None) -> Tensor:
    """[B|1, H|1, R|1, 1]: how many keys each row sees, one where it sees none, in s's dtype."""
    if seen is None:
        return s.new_full((1, 1, 1, 1), s.shape[-1])
    return seen.expand(*seen.shape[:-1], s.shape[-1]).sum(-1, keepdim=True).clamp(min=1).to(s.dtype)


def only_seen(weights: Tensor, seen: Tensor | None) -> Tensor:
    """The weights, zero where a key is not seen."""
    return weights if seen is None else weights.masked_fill(~seen, 0)
