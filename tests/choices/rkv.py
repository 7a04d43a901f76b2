"""R-KV: the last w tokens, and of those before the best by attention less likeness to the others."""

import math
from typing import ClassVar

import torch

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "window": 3, "pool": 3, "mix": 0.4, "similar": 0.2}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "window": (SMALL, {**SMALL, "window": 5}),
        "pool": (SMALL, {**SMALL, "pool": 1}),
        "mix": (SMALL, {**SMALL, "mix": 0.9}),
        "similar": (SMALL, {**SMALL, "similar": 0.7}),
    }
    # likeness alone, attention alone, a window longer than the budget and than a question
    more = (
        {**SMALL, "mix": 0.0, "window": 1},
        {**SMALL, "mix": 1.0, "pool": 5},
        {**SMALL, "budget": 4, "window": 7},
    )
    slides: ClassVar = {**SMALL, "budget": 3, "window": 1}
    long = 1036

    def own_budget(self) -> int:
        return 1024

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        tokens, cfg = at.lasting(g), self.cfg
        asked, alike = self.importance(at, g, tokens), self.redundancy(at, g, tokens)
        score = {j: cfg.mix * asked[j] - (1 - cfg.mix) * alike[j] for j in tokens}
        return score, [j for j in tokens if j >= at.n - min(cfg.window, at.budget)]

    def importance(self, at: Moment, g: int, tokens: list[int]) -> dict[int, float]:
        before = [j for j in tokens if j < at.n - self.cfg.window]
        queries, votes = range(max(0, at.n - self.cfg.window), at.n), dict.fromkeys(before, 0.0)
        for i in queries if before else ():
            by_head = [at.scores(h, i, before).tolist() for h in at.query_heads(g)]
            best = [max(scores) for scores in zip(*by_head, strict=True)]
            largest = max(best)
            exps = [math.exp(x - largest) for x in best]
            total = sum(exps)
            for j, x in zip(before, exps, strict=True):
                votes[j] += x / total / len(queries)
        reach = self.cfg.pool // 2
        pooled = {j: max(votes.get(i, 0.0) for i in range(j - reach, j + reach + 1)) for j in before}
        return {j: pooled.get(j, 0.0) for j in tokens}

    def redundancy(self, at: Moment, g: int, tokens: list[int]) -> dict[int, float]:
        keys = at.k[g][tokens]
        unit = torch.stack([k / (sum(x * x for x in k.tolist()) ** 0.5 + 1e-8) for k in keys])
        cosines = unit @ unit.T
        for i, row in enumerate(cosines):
            row[i] = 0.0
            near = (row > self.cfg.similar).nonzero()
            if len(near):
                row[near[-1]] = 0.0
        exps = [math.exp(x / len(tokens)) for x in cosines.sum(0).tolist()]
        total = sum(exps)
        return {j: x / total for j, x in zip(tokens, exps, strict=True)}
