"""Quest: the newest page, and those whose largest conceivable score is best, by query head."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 8, "page": 3, "full": 1}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "page": (SMALL, {**SMALL, "page": 2}),
        "full": (SMALL, {**SMALL, "full": 0}),
    }
    # of a page that is larger than the budget the newest tokens; one page alone
    more = (
        {"budget": 3, "page": 5, "full": 0},
        {"budget": 5, "page": 4, "full": 2},
        {"budget": 0.3, "page": 4},
    )
    slides: ClassVar = {"budget": 4, "page": 2, "full": 0}
    long = 1060

    def own_budget(self) -> int:
        return 1024

    def reads(self, at: Moment) -> list[list[int]] | None:
        if at.layer < self.cfg.full:
            return None
        self.remember(at)
        if not at.decodes or len(at.held[0]) <= at.budget:
            return None
        return [self.best(at, h) for h in range(len(at.q))]

    def remember(self, at: Moment) -> None:
        """The largest and the smallest number of each channel, of the pages that have a new token."""
        size = self.cfg.page
        for g, tokens in enumerate(at.held):
            for p in {i // size for i in at.new}:
                k = at.k[g, [j for j in tokens if j // size == p]].tolist()
                self.memory[at.layer, g, p] = [
                    (max(channel), min(channel)) for channel in zip(*k, strict=True)
                ]

    def best(self, at: Moment, h: int) -> list[int]:
        size, g, q = self.cfg.page, at.kv_head(h), at.q[h, -1].tolist()
        newest = (at.n - 1) // size
        if at.budget < size:
            return [j for j in at.held[g] if j // size == newest and j >= at.n - at.budget]
        bound = {
            p: sum(
                max(x * high, x * low) for x, (high, low) in zip(q, self.memory[at.layer, g, p], strict=True)
            )
            for p in {j // size for j in at.held[g]} - {newest}
        }
        pages = [newest, *largest(bound, at.budget // size - 1)]
        return [j for j in at.held[g] if j // size in pages]
