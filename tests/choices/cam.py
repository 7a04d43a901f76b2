"""CaM over H2O: the value of what goes is shared out to the kept tokens that follow, if its lot is below its share."""

from typing import ClassVar

from tests.choices.h2o import Written as Below
from tests.choices.random_eviction import lot
from torch import Tensor

from regard.testing.cache.definition import Moment

SMALL = {"budget": 8, "following": 3}


class Written(Below):
    moves: ClassVar = {
        "following": (SMALL, {**SMALL, "following": 2}),
        "seed": (SMALL, {**SMALL, "seed": 1}),
    }
    # fewer tokens follow than are asked for; shares of the text; hardly a token stays
    more = (
        {"budget": 6, "following": 32, "recent": 0.2},
        {"budget": 0.4, "following": 4, "seed": 5},
        {"budget": 2, "following": 1},
        {"budget": 9, "following": 2, "recent": 0.9, "seed": 123456789},
    )
    slides: ClassVar = {"budget": 4, "following": 2}

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        received, cfg = self.memory[at.layer, g], self.cfg.cam
        values: dict[int, Tensor] = {}
        for i in at.lasting(g):
            after = [j for j in held if j > i][: cfg.following]
            if i in held or not after:
                continue
            share = received[i] * len(after) / sum(received[j] for j in after)
            if lot(cfg.seed, at.layer, g, i) / 2**24 < share:
                for j in after:
                    values[j] = values.get(j, at.v[g, j]) + at.v[g, i] / len(after)
        return {j: (at.k[g, j], value) for j, value in values.items()}
