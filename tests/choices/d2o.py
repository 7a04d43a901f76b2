"""D2O: heavy hitters, first and recent tokens stay; what goes is merged into the kept token with the nearest key."""

from math import ceil, exp, sqrt
from typing import ClassVar

from torch import Tensor

from regard.testing.cache.definition import Definition, Moment


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / sqrt(float(a @ a) * float(b @ b))


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8, "sinks": 2}, {"budget": 0.4, "sinks": 2}),
        "recent": ({"budget": 8, "sinks": 2}, {"budget": 8, "sinks": 2, "recent": 0.2}),
        "sinks": ({"budget": 6, "recent": 0.2, "sinks": 4}, {"budget": 6, "recent": 0.2, "sinks": 0}),
        "smoothing": ({"budget": 8, "sinks": 2}, {"budget": 8, "sinks": 2, "smoothing": 0.9}),
    }
    # no room for the first tokens; the threshold of the first eviction for ever, and of the last one alone
    more = (
        {"budget": 5, "recent": 0.9},
        {"budget": 4, "recent": 0.0, "sinks": 9},
        {"budget": 8, "sinks": 1, "smoothing": 0.0},
        {"budget": 6, "sinks": 1, "smoothing": 1.0},
        {"budget": 25, "recent": 0.6, "sinks": 3},
    )
    slides: ClassVar = {"budget": 4, "sinks": 1}

    def own_budget(self) -> float:
        return 0.2

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        received = self.memory.setdefault(("received", at.layer, g), {})
        for h in at.query_heads(g):
            for i in at.new:
                seen = at.seen(i, at.held[g])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    received[j] = received.get(j, 0.0) + weight
        recent = max(1, ceil(round(at.budget * self.cfg.recent, 9)))
        first = min(self.cfg.sinks, at.budget - recent)
        stay = [j for j in at.lasting(g) if j >= at.n - recent or j < first]
        return {j: received[j] for j in at.lasting(g)}, stay

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        gone = [j for j in at.lasting(g) if j not in held]
        if not gone:
            return {}
        k, v, like, into = at.k[g], at.v[g], {}, {}
        for i in gone:
            near = {c: cosine(k[i], k[c]) for c in held}
            into[i] = max(near, key=near.__getitem__)
            like[i] = near[into[i]]
        mean, key = sum(like.values()) / len(gone), ("threshold", at.layer, g)
        beta, old = self.cfg.smoothing, self.memory.get(key)
        bar = self.memory[key] = mean if old is None else beta * mean + (1 - beta) * old
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for c in held:
            parts = [(exp(like[i]), i) for i in gone if into[i] == c and like[i] >= bar]
            if parts:
                total = exp(1) + sum(w for w, _ in parts)
                found[c] = tuple((exp(1) * x[c] + sum(w * x[i] for w, i in parts)) / total for x in (k, v))  # type: ignore[assignment]
        return found
