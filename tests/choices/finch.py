"""FINCH: the question's tokens, and the best of the document by its votes, in all of it or in each chunk first."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 8, "window": 3}
CHUNKS = {"budget": 9, "window": 2, "chunk": 4}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "window": (SMALL, {**SMALL, "window": 1}),
        "chunk": (CHUNKS, {**CHUNKS, "chunk": None}),
    }
    # a question longer than the budget, and than a turn; chunks that have no part
    more = (
        {"budget": 3, "window": 5},
        {"budget": 10, "window": 6, "chunk": 3},
        {"budget": 0.3, "window": 1, "chunk": 2},
        {"budget": 0.6, "window": 3, "chunk": 7},
    )
    slides: ClassVar = {"budget": 4, "window": 1, "chunk": 3}
    long = 90
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        document = at.n - self.cfg.window
        votes = dict.fromkeys(at.lasting(g), 0.0)
        for h in at.query_heads(g):
            for i in at.new[-self.cfg.window :]:
                seen = at.seen(i, at.held[g])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    if j in votes and j < document:
                        votes[j] += weight * len(seen)
        if self.cfg.chunk is not None:
            spare, size = max(0, at.budget - self.cfg.window), self.cfg.chunk
            for start in range(0, document, size):
                chunk = range(start, min(start + size, document))
                first = largest({j: votes[j] for j in chunk if j in votes}, spare * len(chunk) // document)
                for j in first:
                    votes[j] += 1e6
        return votes, [j for j in votes if j >= at.n - min(self.cfg.window, at.budget)]
