"""Loki: the tokens with the best scores by the first principal components of the prompt's keys, by query head."""

from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 6, "components": 0.25}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "components": (SMALL, {**SMALL, "components": 0.1}),
    }
    more = ({"budget": 1, "components": 0.3}, {"budget": 5, "components": 1.0})
    slides: ClassVar = {"budget": 3, "components": 0.25}

    def own_budget(self) -> float:
        return 0.25

    def reads(self, at: Moment) -> list[list[int]] | None:
        count = ceil(round(self.cfg.components * at.k.shape[-1], 9))
        for g in range(len(at.k)):
            if (at.layer, g) not in self.memory:
                self.memory[at.layer, g] = self.directions(at.k[g], count)
        if not at.decodes or len(at.held[0]) <= at.budget:
            return None
        return [self.best(at, h, self.memory[at.layer, at.kv_head(h)]) for h in range(len(at.q))]

    def directions(self, k: Tensor, count: int) -> list[Tensor]:
        """One after the other, each from what those before it leave: the singular vectors of centred keys."""
        _, s, found = torch.linalg.svd(k - k.mean(0), full_matrices=False)
        return [v for v, x in zip(found, s**2, strict=True) if x > 1e-10 * float((s**2).sum())][:count]

    def best(self, at: Moment, h: int, directions: list[Tensor]) -> list[int]:
        q, k = at.q[h, -1], at.k[at.kv_head(h)]
        tokens = at.seen(at.n - 1, at.held[at.kv_head(h)])
        return largest(
            {j: sum(float(q @ v) * float(k[j] @ v) for v in directions) for j in tokens}, at.budget
        )
