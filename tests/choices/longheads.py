"""LongHeads: a query reads the first chunk, the last two, and the best of the rest by its head; positions close up."""

from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment

SMALL = {"chunk": 3, "chunks": 4}


class Written(Definition):
    moves: ClassVar = {
        "chunk": (SMALL, {**SMALL, "chunk": 2}),
        "chunks": (SMALL, {**SMALL, "chunks": 3}),
        "budget": (SMALL, {**SMALL, "budget": 9}),
        "trained": (SMALL, {**SMALL, "trained": 22}),
    }
    more = (
        {"chunk": 4, "chunks": 3, "budget": 0.5},
        {"chunk": 2, "chunks": 3, "budget": 11, "trained": 5},
        {"chunk": 2, "chunks": 5},
    )
    long = 4102

    def size(self, budget: int) -> int:
        """Tokens of a chunk: where a budget has no room for all chunks, they shrink, to 16 where four of these fit."""
        cfg = self.cfg
        return max(1, min(cfg.chunk, budget // cfg.chunks), min(cfg.chunk, 16, budget // 4))

    def answer(self, at: Moment, h: int, i: int, tokens: list[int]) -> Tensor:
        cfg, g = self.cfg, at.kv_head(h)
        limited = cfg.budget is not None
        budget = at.budget if not isinstance(cfg.budget, int) else cfg.budget
        w = self.memory.setdefault(
            "w", self.size(budget) if limited else cfg.chunk
        )  # of the first forward, for good
        count = max(3, budget // w) if limited else cfg.chunks
        whole = max(count * w, budget if limited else 0, cfg.trained or 0)
        if i < whole:
            return super().answer(at, h, i, tokens)
        slots = self.chosen(at, h, i, w, count)
        keys = at.rotate(at.plain_k[g][slots], torch.arange(len(slots)))
        query = at.rotate(at.plain_q[h, i : i + 1], torch.tensor([len(slots) - 1]))[0]
        return (keys @ query * at.scale).softmax(0) @ at.v[g][slots]

    def chosen(self, at: Moment, h: int, i: int, w: int, count: int) -> list[int]:
        t = i // w
        rated = {c: float(at.plain_q[h, i] @ self.key(at, h, c, w)) for c in range(1, t - 1)}
        best = sorted(rated, key=lambda c: (-rated[c], c))[: count - 3]
        return [j for c in sorted([0, *best, t - 1, t]) for j in range(c * w, c * w + w) if j <= i]

    def key(self, at: Moment, h: int, c: int, w: int) -> Tensor:
        """Of chunk c: what its queries answer in the mean, within the chunk and not causal, asks its keys."""
        name = at.layer, h, c
        if name not in self.memory:
            g, part, near = at.kv_head(h), slice(c * w, c * w + w), torch.arange(w)
            q, k = at.rotate(at.plain_q[h, part], near), at.rotate(at.plain_k[g, part], near)
            mean = ((q @ k.T * at.scale).softmax(-1) @ at.v[g, part]).mean(0)
            self.memory[name] = (k @ mean * at.scale).softmax(0) @ k
        return self.memory[name]
