"""Double Sparsity: the tokens with the best scores by the channels that were strongest on the prompt, by query head."""

from math import ceil
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 6, "channels": 0.25, "full": 0}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "channels": (SMALL, {**SMALL, "channels": 0.5}),
        "full": (SMALL, {**SMALL, "full": 1}),
    }
    more = ({"budget": 1, "channels": 0.3, "full": 2}, {"budget": 5, "channels": 1.0, "full": 0})
    slides: ClassVar = {"budget": 3, "channels": 0.25, "full": 0}

    def own_budget(self) -> float:
        return 1 / 16

    def reads(self, at: Moment) -> list[list[int]] | None:
        if at.layer < self.cfg.full:
            return None
        for h in range(len(at.q)):
            if (at.layer, h) not in self.memory:
                self.memory[at.layer, h] = self.chosen(at, h)
        if not at.decodes or len(at.held[0]) <= at.budget:
            return None
        return [self.best(at, h, self.memory[at.layer, h]) for h in range(len(at.q))]

    def chosen(self, at: Moment, h: int) -> list[int]:
        width, k = at.k.shape[-1], at.k[at.kv_head(h)]
        mean = {c: sum(abs(float(at.q[h, i, c] * k[i, c])) for i in at.new) / at.fed for c in range(width)}
        return largest(mean, ceil(round(self.cfg.channels * width, 9)))

    def best(self, at: Moment, h: int, channels: list[int]) -> list[int]:
        q, k = at.q[h, -1], at.k[at.kv_head(h)]
        tokens = at.seen(at.n - 1, at.held[at.kv_head(h)])
        return largest({j: sum(float(q[c] * k[j, c]) for c in channels) for j in tokens}, at.budget)
