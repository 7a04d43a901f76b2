"""Leverage: after a prompt the tokens whose keys, before rotary positions, stand out most from all that are stored."""

import math
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


def solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix · x = right, by elimination."""
    rows = [[*row, b] for row, b in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [x - rows[r][i] * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def leverages(keys: dict[int, list[float]], ridge: float) -> dict[int, float]:
    channels = range(len(next(iter(keys.values()), [])))
    mean = [sum(key[c] for key in keys.values()) / len(keys) for c in channels]
    apart = {j: [key[c] - mean[c] for c in channels] for j, key in keys.items()}
    gram = [[sum(x[a] * x[b] for x in apart.values()) + ridge * (a == b) for b in channels] for a in channels]
    return {j: sum(a * b for a, b in zip(x, solved(gram, x), strict=True)) for j, x in apart.items()}


def rounded(x: float) -> float:
    """In 13 bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**13) / 2**13, exponent)


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8}, {"budget": 0.4}),
        "ridge": ({"budget": 8}, {"budget": 8, "ridge": 30.0}),
    }
    more = ({"budget": 1}, {"budget": 17, "ridge": 1.0})
    slides: ClassVar = {"budget": 3}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        keys = {j: at.plain_k[g, j].tolist() for j in at.lasting(g)}
        return {j: rounded(s) for j, s in leverages(keys, self.cfg.ridge).items()}, [at.n - 1]
