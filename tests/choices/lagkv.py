"""LagKV: the first tokens, those without a whole part behind theirs, and an equal share of every other part."""

import math
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 12, "sinks": 1, "lag": 3}


def deviation(xs: list[float]) -> float:
    mean = sum(xs) / len(xs)
    return math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1))


def softmax(xs: dict[int, float]) -> dict[int, float]:
    top = max(xs.values())
    total = sum(math.exp(x - top) for x in xs.values())
    return {j: math.exp(x - top) / total for j, x in xs.items()}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.7}),
        "sinks": (SMALL, {**SMALL, "sinks": 4}),
        "lag": (SMALL, {**SMALL, "lag": 2}),
    }
    # no room for what always stays, nor for the sinks; a budget that makes old parts shrink step by step
    more = (
        {"budget": 4, "sinks": 2, "lag": 3},
        {"budget": 3, "sinks": 5, "lag": 2},
        {"budget": 1, "sinks": 1, "lag": 2},
        {"budget": 13, "sinks": 0, "lag": 4},
        {"budget": 6, "sinks": 0, "lag": 4},
        {"budget": 0.6, "sinks": 2, "lag": 5},
    )
    slides: ClassVar = {"budget": 5, "sinks": 1, "lag": 2}
    long = 420

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        cfg, tokens = self.cfg, at.lasting(g)
        if len(tokens) <= at.budget:  # nothing goes, and nothing is judged
            return dict.fromkeys(tokens, 0.0), []
        shares = self.memory.setdefault((at.layer, g), {})
        first_unjudged = max(cfg.sinks, cfg.sinks + ((at.n - cfg.sinks) // cfg.lag - 1) * cfg.lag)
        for start in range(cfg.sinks, first_unjudged, cfg.lag):
            part = [j for j in tokens if start <= j < start + cfg.lag]
            after = [j for j in tokens if start + cfg.lag <= j < start + 2 * cfg.lag]
            if any(j not in shares for j in part):
                assert len(after) == cfg.lag
                keys, values = (self.spread(x[g].tolist(), part, after) for x in (at.k, at.v))
                order = sorted(part, key=lambda j: (-(keys[j] + values[j]), j))
                for place, j in enumerate(order):
                    shares.setdefault(j, 1 - place / cfg.lag)
        sinks = min(cfg.sinks, at.budget - 1)
        newest = min(max(1, at.n - first_unjudged), at.budget - sinks)
        always = [j for j in tokens if j < sinks or j >= at.n - newest]
        return {j: shares.get(j, 0.0) for j in tokens}, always

    @staticmethod
    def spread(x: list[list[float]], part: list[int], after: list[int]) -> dict[int, float]:
        channels = range(len(x[0]))
        low = [min(x[j][c] for j in after) for c in channels]
        high = [max(x[j][c] for j in after) for c in channels]
        return softmax(
            {j: deviation([(x[j][c] - low[c]) / max(high[c] - low[c], 1e-6) for c in channels]) for j in part}
        )
