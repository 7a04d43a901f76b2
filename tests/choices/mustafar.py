"""Mustafar: tokens that left the window are stored with zeros in the place of their smallest numbers."""

from typing import ClassVar

from torch import Tensor

from regard.testing.cache.definition import Definition, Moment

SMALL = {"keys": 0.6, "values": 0.4, "window": 3}


def without_smallest(x: Tensor, share: float) -> Tensor:
    places = sorted(range(len(x)), key=lambda d: (abs(float(x[d])), -d))
    out = x.clone()
    for d in places[: int(len(x) * share)]:
        out[d] = 0
    return out


class Written(Definition):
    moves: ClassVar = {
        "keys": (SMALL, {**SMALL, "keys": 0.0}),
        "values": (SMALL, {**SMALL, "values": 0.7}),
        "window": (SMALL, {**SMALL, "window": 9}),
    }
    more = ({"keys": 0.5, "values": 0.5, "window": 0},)
    long = 60

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        cfg, done = self.cfg.mustafar, self.memory.setdefault(("done", at.layer, g), set())
        found = {}
        for j in held[: max(0, len(held) - cfg.window)]:
            if j not in done:
                found[j] = without_smallest(at.k[g, j], cfg.keys), without_smallest(at.v[g, j], cfg.values)
                done.add(j)
        return found
