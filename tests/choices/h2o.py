"""H2O: the most recent tokens, and of the others those that received most attention while they were held."""

from math import ceil
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8}, {"budget": 0.4}),
        "recent": ({"budget": 8}, {"budget": 8, "recent": 0.2}),
    }
    # 0.6 · 25 is 15, in float32 a little more
    more = ({"budget": 5, "recent": 0.0}, {"budget": 9, "recent": 0.9}, {"budget": 25, "recent": 0.6})
    slides: ClassVar = {"budget": 4}

    def own_budget(self) -> float:
        return 0.2

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        received = self.memory.setdefault((at.layer, g), {})
        for h in at.query_heads(g):
            for i in at.new:
                seen = at.seen(i, at.held[g])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    received[j] = received.get(j, 0.0) + weight
        recent = [j for j in at.lasting(g) if j >= at.n - max(1, ceil(round(at.budget * self.cfg.recent, 9)))]
        return {j: received[j] for j in at.lasting(g)}, recent
