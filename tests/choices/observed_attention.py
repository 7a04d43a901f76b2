"""Observed attention: the tokens with the most attention for each query of the prompt that saw them."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {"budget": ({"budget": 8}, {"budget": 0.4})}
    more = ({"budget": 1}, {"budget": 14})
    slides: ClassVar = {"budget": 3}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        received = dict.fromkeys(at.lasting(g), 0.0)
        times = dict.fromkeys(received, 0)
        for h in at.query_heads(g):
            for i in at.new:
                seen = at.seen(i, at.held[g])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    if j in received:
                        received[j] += weight
                        times[j] += 1
        return {j: total / times[j] for j, total in received.items()}, [at.n - 1]
