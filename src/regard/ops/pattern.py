"""What attention over keys and values shares among its pages: the pattern, the state that carries on, the mask."""

from typing import Any

import torch
from torch import Tensor

from regard.core import K, Q, V, require
from regard.core.mask import Mask
from regard.core.shapes import PATTERNS
from regard.ops.softmax import lower_right


def carried(k: K, v: V, pattern: str, state: tuple | None) -> tuple[K, V, tuple | None]:
    """All keys and values so far, and the state that carries them on: (keys, values) for causal_self, else None."""
    require(pattern in PATTERNS, f"pattern is one of {PATTERNS}", pattern=pattern)
    require(state is None or pattern == "causal_self", "only causal_self carries a state", pattern=pattern)
    if state is not None:
        k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
    return k, v, (k, v) if pattern == "causal_self" else None


def dense_mask(mask: Mask | Tensor | None, q: Q, k: K, roles: Any) -> Tensor | None:
    """A mask of the algebra as a bool tensor [B|1, H|1, N, M]; a tensor as it is."""
    if not isinstance(mask, Mask):
        return mask
    return mask.dense(q.shape[2], k.shape[2], heads=q.shape[1], roles=roles, device=q.device)


def seen_by(mask: Mask | Tensor | None, q: Q, k: K, roles: Any, pattern: str) -> Tensor | None:
    """Mask and causality together, the last query at the last key; None: every query sees every key."""
    mask, n, m = dense_mask(mask, q, k, roles), q.shape[2], k.shape[2]
    if pattern != "causal_self" or (n == 1 and mask is None):
        return mask
    lower = lower_right(n, m, q.device)
    return lower if mask is None else mask & lower
