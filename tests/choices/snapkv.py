"""SnapKV: after a prompt its last w tokens, and the best of those before by the votes of these w, pooled."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 0.4, "window": 3, "pool": 3}),
        "window": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 8, "window": 1, "pool": 3}),
        "pool": ({"budget": 8, "window": 3, "pool": 3}, {"budget": 8, "window": 3, "pool": 1}),
    }
    # a window longer than the budget, and than a question
    more = ({"budget": 3, "window": 5, "pool": 3}, {"budget": 10, "window": 6, "pool": 5})
    slides: ClassVar = {"budget": 3, "window": 1, "pool": 3}
    long = 1040
    phase = "prefill"

    def own_budget(self) -> int:
        return 1024

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        tokens = at.lasting(g)
        votes = dict.fromkeys((j for j in tokens if j < at.n - self.cfg.window), 0.0)
        for h in at.query_heads(g):
            for i in at.new[-self.cfg.window :]:
                seen = at.seen(i, at.held[g])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    if j in votes:
                        votes[j] += weight
        reach = self.cfg.pool // 2
        pooled = {j: max(votes.get(i, 0.0) for i in range(j - reach, j + reach + 1)) for j in votes}
        # beyond the budget a token of the window weighs nothing
        pooled |= {j: 0.0 for j in tokens if j not in pooled}
        return pooled, [j for j in tokens if j >= at.n - min(self.cfg.window, at.budget)]
