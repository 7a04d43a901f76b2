"""CAKE: mean and variance of the attention from the last w queries, averaged over neighbours; layers share a budget."""

from typing import ClassVar

from tests.choices.parts.layers_asked import observed, preference, shared, spread_of

from regard.testing.cache.definition import Definition, Moment, Text

SMALL = {"budget": 8, "window": 3, "pool": 3, "gamma": 5.0}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "window": (SMALL, {**SMALL, "window": 2}),
        "gamma": (SMALL, {**SMALL, "gamma": 0.0}),
        "pool": (SMALL, {**SMALL, "pool": 1}),
        "spread": (SMALL, {**SMALL, "spread": 0.2}),
        "motion": (SMALL, {**SMALL, "motion": 0.2}),
    }
    # a window longer than the budget; layers that hold all
    more = ({"budget": 3, "window": 5, "pool": 3}, {"budget": 0.8, "window": 4, "motion": 0.3, "pool": 5})
    slides: ClassVar = {"budget": 3, "window": 2, "pool": 3}
    long = 1040
    phase = "prefill"

    def own_budget(self) -> int:
        return 1024

    def together(self, moments: list[Moment], text: Text) -> None:
        if moments[0].decodes:
            return
        wanted = [preference(at, self.cfg.window, self.cfg.spread, self.cfg.motion) for at in moments]
        self.tokens = shared(moments, wanted, [len(self.stays(at, 0)) for at in moments])

    def stays(self, at: Moment, g: int) -> list[int]:
        return [j for j in at.lasting(g) if j >= at.n - min(self.cfg.window, at.budget)]

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        votes = dict.fromkeys((j for j in at.lasting(g) if j < at.n - self.cfg.window), 0.0)
        for h in at.query_heads(g):
            given = observed(at, h, self.cfg.window)
            for j in votes:
                values = [row[j] for row in given]
                votes[j] += sum(values) / len(values) + self.cfg.gamma * spread_of(values)
        reach = self.cfg.pool // 2
        pooled = {
            j: sum(votes.get(i, 0.0) for i in range(j - reach, j + reach + 1)) / self.cfg.pool for j in votes
        }
        return pooled | {j: 0.0 for j in at.lasting(g) if j not in pooled}, self.stays(at, g)

    def shares(self, at: Moment, ranked: list) -> list[int]:
        return [self.tokens[at.layer]] * len(ranked)
