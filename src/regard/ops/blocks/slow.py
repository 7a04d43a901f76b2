"""For references of pages that choose blocks: each text by itself, dense, in float64, apart from the fast path."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.core import Unsupported
from regard.core.call import Call
from regard.ops.blocks.placed import BY_HEAD
from regard.ops.pattern import all_unrotated, carried
from regard.ops.recurrence import exact, heads_of

# one text: q [H, N, D], k [H, M, D], the place of query 0, settings -> [H, N, M] bool, what is read
Sees = Callable[..., Tensor]
# the same with v [H, M, E] -> out [H, N, E]; where the call has unrotated queries and keys, they come last
One = Callable[..., Tensor]


def by_text(one: One, q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call) -> tuple[Tensor, Any]:
    """(out, state): `one` asked for each row of the batch, of its real tokens alone; what is hidden gives zeros."""
    if call.key_mask is not None and call.key_mask.shape[1] != 1:
        raise Unsupported(BY_HEAD)
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    raw = all_unrotated(call, state)
    raw_h = () if raw is None else exact(raw[0], heads_of(raw[1], q.shape[1]))
    n, m = q.shape[2], k.shape[2]
    rows = []
    for b in range(len(q)):
        real = (
            torch.ones(m, dtype=torch.bool)
            if call.key_mask is None
            else call.key_mask[b % len(call.key_mask), 0]
        )
        there = torch.ones(n, dtype=torch.bool) if call.cross else real[m - n :]
        out = torch.zeros(*q_h.shape[1:3], v_h.shape[3], dtype=v_h.dtype)
        if bool(real.any()) and bool(there.any()):
            start = int(real[: m - n].sum()) if call.pattern == "causal_self" else 0
            apart = [x[b][:, of] for x, of in zip(raw_h, (there, real))]
            found = one(q_h[b][:, there], k_h[b][:, real], v_h[b][:, real], start, cfg, *apart)
            out = out.index_copy(1, there.nonzero()[:, 0], found)
        rows.append(out)
    return torch.stack(rows).to(v.dtype), state


def slow_attention(sees: Sees, q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call) -> tuple[Tensor, Any]:
    """(out, state): softmax over the keys that `sees` names, beside causality and what the settings leave dense.

    `sees` is asked of unrotated queries and keys where the call has them.
    """

    def one(q: Tensor, k: Tensor, v: Tensor, start: int, cfg: Any, *unrotated: Tensor) -> Tensor:
        n, m = q.shape[1], k.shape[1]
        seen = sees(*(x.detach() for x in unrotated or (q, k)), start, cfg)
        place = torch.arange(n) + start
        if m <= cfg.dense_below:
            seen = torch.ones_like(seen)
        if cfg.dense_last:
            block = place // cfg.block_q
            seen = seen | ((block + 1) * cfg.block_q > start + n - cfg.dense_last)[:, None]
        if call.pattern == "causal_self":
            seen = seen & (torch.arange(m) <= place[:, None])
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        top = s.amax(-1, keepdim=True).detach().nan_to_num(neginf=0.0)
        e = (s - top).exp()
        return e @ v / e.sum(-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)

    return by_text(one, q, k, v, cfg, call)
