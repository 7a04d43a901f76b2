"""What attention over stored keys and values shares among its pages: the state that carries on, who sees whom."""

from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.linear import shown
from regard.ops.softmax import lower_right, per_query_head


def carried(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Any]:
    """All keys and values so far, and the state that carries them on: (keys, values) for causal_self, else None.

    Where the call has unrotated keys, they are the third of the state. What no query may see is zero among keys and
    values, so that NaN under padding stays there, and stands as it came in the state.
    """
    kept = (k, v) if call.unrotated is None else (k, v, call.unrotated[1])
    if call.initial_state is not None:
        kept = tuple(torch.cat([old, new], dim=2) for old, new in zip(call.initial_state, kept, strict=True))
    k, v, *_ = kept
    state = kept if call.pattern == "causal_self" else None
    seen = call.key_mask if call.pair_mask is None else call.pair_mask.any(2)
    if seen is None:
        return k, v, state
    if seen.shape[1] not in (1, k.shape[1]):
        k, v = (per_query_head(t, seen.shape[1]).expand(-1, seen.shape[1], -1, -1) for t in (k, v))
    return shown(k, seen), shown(v, seen), state


def all_unrotated(call: Call, state: Any) -> tuple[Tensor, Tensor] | None:
    """The call's unrotated queries and all unrotated keys so far, of the state that `carried` gave."""
    if call.unrotated is None or state is None:
        return call.unrotated
    return call.unrotated[0], state[2]


def visible(call: Call, queries: int, keys: int, device: Any = None) -> Tensor | None:
    """[B|1, H|1, N, M] bool: masks and causality together, the last query at the last key; None: all see all."""
    seen = None if call.key_mask is None else call.key_mask[:, :, None]
    if call.pair_mask is not None:
        seen = call.pair_mask if seen is None else seen & call.pair_mask
    if call.pattern != "causal_self" or queries == 1:
        return seen
    lower = lower_right(queries, keys, device)
    return lower if seen is None else seen & lower
