"""The fast path of a page that chooses blocks: tokens to their places, the choice, attention over what was chosen."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.placed import Placed, placed
from regard.ops.pattern import carried

CLOCK: ContextVar[dict[str, float] | None] = ContextVar("CLOCK", default=None)


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds spent in it by what: "estimate", choosing blocks, and "attention", over those that were chosen."""
    seconds: dict[str, float] = {}
    token = CLOCK.set(seconds)
    try:
        yield seconds
    finally:
        CLOCK.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Time that counts for a part of the work, where somebody asks."""
    seconds = CLOCK.get() if not torch.compiler.is_compiling() else None
    if seconds is None:
        yield
        return
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def run_blocks(
    choose: Callable[..., Tensor | Blocks], q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call
) -> tuple[Tensor, Any, dict[str, Any]]:
    """(out, state, aux) of choose(at, cfg, call) -> Blocks, or a map [B|1, H|1, I, J] bool of what may be read.

    `at` are the tokens in their places. cfg has block_q and block_k, and BlockSettings. aux holds "blocks", what was
    read, and "lse" [B, H, N], the logarithm of the sum of e^score over it.
    """
    k, v, state = carried(k, v, call)
    at = placed(q, k, v, call, cfg.block_q)
    with part("estimate"), torch.no_grad():
        blocks = chosen(choose, at, cfg, call)
    with part("attention"):
        out, lse = block_attention(
            at.q,
            at.k,
            at.v,
            blocks,
            scale=q.shape[-1] ** -0.5,
            causal=at.causal,
            start=at.start,
            length=at.length,
        )
        out = at.back(out)
    return out.to(v.dtype), state, {"blocks": blocks, "lse": at.back(lse)}


def chosen(choose: Callable, at: Placed, cfg: Any, call: Call) -> Blocks:
    """What is read: what the page chose, and what the settings leave dense."""
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    if at.k.shape[2] <= cfg.dense_below:
        return Blocks.of_map(allowed, cfg.block_q, cfg.block_k)
    found = choose(at, cfg, call)
    if isinstance(found, Blocks):
        if not cfg.dense_last:
            return found
        found = found.map(allowed.shape[-1])
    if cfg.dense_last:
        end = at.length[:, None, None, None] if at.causal else at.queries
        last = end - cfg.dense_last
        found = found | (at.first(cfg.block_q) + cfg.block_q > last)
    return Blocks.of_map(found & allowed, cfg.block_q, cfg.block_k)
