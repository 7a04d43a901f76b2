"""Random eviction: after a prompt the tokens that drew the highest lots, and the newest."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

BITS = 2**32


def lot(*numbers: int) -> int:
    """A whole number below 2^24."""
    code = 0
    for number in numbers:
        code = (code * 2654435761 + number + 1) % BITS
        code = ((code ^ (code // 2**16)) * 2246822507) % BITS
        code = ((code ^ (code // 2**13)) * 3266489909) % BITS
        code ^= code // 2**16
    return code // 256


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8}, {"budget": 0.4}),
        "seed": ({"budget": 8}, {"budget": 8, "seed": 1}),
    }
    more = ({"budget": 1, "seed": 7}, {"budget": 17, "seed": 123456789})
    slides: ClassVar = {"budget": 3}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        return {j: float(lot(self.cfg.seed, at.layer, g, j)) for j in at.lasting(g)}, [at.n - 1]
