"""KeyDiff: after every step the tokens whose keys are least like the mean of all stored keys, and the newest."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


def length(x: list[float]) -> float:
    return sum(c * c for c in x) ** 0.5


class Written(Definition):
    moves: ClassVar = {"budget": ({"budget": 8}, {"budget": 0.4})}
    more = ({"budget": 1}, {"budget": 17})
    slides: ClassVar = {"budget": 3}
    long = 2060

    def own_budget(self) -> int:
        return 2048

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        keys = {j: at.k[g, j].tolist() for j in at.lasting(g)}
        width = at.k.shape[-1]
        anchor = [sum(key[c] / length(key) for key in keys.values()) / len(keys) for c in range(width)]
        alike = {
            j: sum(a * b for a, b in zip(anchor, key)) / length(anchor) / length(key)
            for j, key in keys.items()
        }
        return {j: -cosine for j, cosine in alike.items()}, [at.n - 1]
