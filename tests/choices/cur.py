"""CurDKV: after a prompt the first tokens, the newest, and those whose keys and values are long for their window."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "window": 5, "sinks": 2}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "by": (SMALL, {**SMALL, "by": "mean"}),
        "window": (SMALL, {**SMALL, "window": 3}),
        "sinks": (SMALL, {**SMALL, "sinks": 4}),
    }
    more = (
        {"budget": 2, "sinks": 3, "window": 4},
        {"budget": 1, "sinks": 1},
        {"budget": 9, "by": "key", "window": 6},
        {"budget": 9, "by": "value", "window": None, "sinks": 0},
        {"budget": 9, "by": "mean", "window": None, "sinks": 1},
    )
    slides: ClassVar = {"budget": 3, "window": 2, "sinks": 1}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        tokens = at.lasting(g)
        key, value = (self.parts({j: x[g, j].tolist() for j in tokens}) for x in (at.k, at.v))
        score = {
            "product": lambda j: key[j] * value[j],
            "mean": lambda j: key[j] + value[j],
            "key": lambda j: key[j],
            "value": lambda j: value[j],
        }[self.cfg.by]
        sinks = min(self.cfg.sinks, at.budget - 1)
        return {j: score(j) for j in tokens}, [j for j in tokens if j < sinks or j == at.n - 1]

    def parts(self, rows: dict[int, list[float]]) -> dict[int, float]:
        squared = {j: sum(c * c for c in row) for j, row in rows.items()}
        size = self.cfg.window or 10**9
        return {
            j: s / sum(t for i, t in squared.items() if i // size == j // size) for j, s in squared.items()
        }
