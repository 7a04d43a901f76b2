"""SnapKV: after a prompt its last w tokens, and the best of those before by the votes of these w, pooled."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, largest


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 0.4, "window": 3, "pool": 3}),
        "window": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 8, "window": 1, "pool": 3}),
        "pool": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 8, "window": 3, "pool": 1}),
    }
    # a window longer than the budget, and than a question
    more = ({"budget": 3, "window": 5, "pool": 3}, {"budget": 10, "window": 6, "pool": 5})
    long = 1040

    def own_budget(self) -> int:
        return 1024

    def keeps(self, at: Moment) -> list[list[int]] | None:
        return None if at.decodes else [self.kept(at, g, tokens) for g, tokens in enumerate(at.held)]

    def kept(self, at: Moment, g: int, tokens: tuple[int, ...]) -> list[int]:
        if len(tokens) <= at.budget:
            return list(tokens)
        before = [j for j in tokens if j < at.n - self.cfg.window]
        observing = [(h, i) for h in at.query_heads(g) for i in at.new[-self.cfg.window :]]
        # whatever else a query sees comes after these
        total = sum(at.weights(h, i, at.seen(i, tokens))[: len(before)] for h, i in observing)
        votes = dict(zip(before, total.tolist(), strict=True))
        reach = self.cfg.pool // 2
        pooled = {j: max(votes.get(i, 0.0) for i in range(j - reach, j + reach + 1)) for j in before}
        window = [j for j in tokens if j >= at.n - min(self.cfg.window, at.budget)]
        return sorted([*largest(pooled, at.budget - len(window)), *window])
