"""TOVA: the tokens that the newest query weighs most, on average over all heads, one set for all of them."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {"budget": ({"budget": 8}, {"budget": 0.4})}
    more = ({"budget": 1}, {"budget": 14})
    slides: ClassVar = {"budget": 3}

    def own_budget(self) -> float:
        return 0.125

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        newest, votes = at.n - 1, dict.fromkeys(at.lasting(g), 0.0)
        for h in range(len(at.q)):
            seen = at.seen(newest, at.held[at.kv_head(h)])
            for j, weight in zip(seen, at.weights(h, newest, seen).tolist(), strict=True):
                if j in votes:
                    votes[j] += weight / len(at.q)
        return votes, [newest]
