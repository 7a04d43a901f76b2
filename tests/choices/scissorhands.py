"""Scissorhands: when more than the budget is held, a share of it goes: what lay below the mean most often of late."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, best_of

SMALL = {"budget": 10, "history": 6, "recent": 2, "drop": 0.3}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.5}),
        "history": (SMALL, {**SMALL, "history": 2}),
        "recent": (SMALL, {**SMALL, "recent": 5}),
        "drop": (SMALL, {**SMALL, "drop": 0.6}),
    }
    # nothing but recent tokens, one that goes at a time, 0.6 · 5 is 3, a history longer than the text
    more = (
        {**SMALL, "budget": 4, "recent": 7},
        {**SMALL, "drop": 0.0},
        {**SMALL, "budget": 5, "drop": 0.6},
        {**SMALL, "history": 60},
    )
    slides: ClassVar = {**SMALL, "budget": 4, "history": 3}
    long = 430

    def own_budget(self) -> float:
        return 0.5

    def keeps(self, at: Moment) -> list[list[int]]:
        return [self.cut(at, g, at.lasting(g)) for g in range(len(at.k))]

    def cut(self, at: Moment, g: int, tokens: list[int]) -> list[int]:
        if len(tokens) <= at.budget:
            return tokens
        low = dict.fromkeys(tokens, 0.0)
        for i in range(max(0, at.n - self.cfg.history), at.n):
            seen = [j for j in tokens if j <= i]
            for h in at.query_heads(g) if seen else ():
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    low[j] -= weight < 1 / len(seen)
        left = at.budget - int(round(at.budget * self.cfg.drop, 9))
        return best_of(low, [j for j in tokens if j >= at.n - min(self.cfg.recent, left)], left)
