"""Knorm: after a prompt the tokens with the smallest key norms, in four digits, and the newest."""

from math import frexp
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {"budget": ({"budget": 8}, {"budget": 0.4})}
    more = ({"budget": 1}, {"budget": 17})
    slides: ClassVar = {"budget": 3}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        lengths = {j: -shown(sum(float(x) ** 2 for x in at.k[g, j]) ** 0.5) for j in at.lasting(g)}
        return lengths, [at.n - 1]


def shown(length: float) -> float:
    """In 13 bits, about four digits."""
    mantissa, exponent = frexp(length)
    return round(mantissa * 2**13) / 2**13 * 2**exponent
