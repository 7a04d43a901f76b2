"""Seconds that parts of a computation take, where somebody asks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

CLOCK: ContextVar[dict[str, float] | None] = ContextVar("CLOCK", default=None)


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds spent within the block by part: "estimate", choosing blocks of keys, "attention", over those that were
    chosen, "scoring", deciding what a cache keeps.
    """
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
    start = now()
    yield
    seconds[name] = seconds.get(name, 0.0) + now() - start


def now() -> float:
    """Seconds, once what a GPU was given is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
