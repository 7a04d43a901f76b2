"""Keyformer: the recent tokens, and of the others those given most by noisy attention, by a rising temperature."""

import math
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "steps": 4}


@cache
def mixed(x: int, salt: int) -> int:
    x = (x + salt * 0x9E3779B1) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x045D9F3B) % 2**32
    return x ^ (x >> 16)


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "recent": (SMALL, {**SMALL, "recent": 0.7}),
        "tau_init": ({**SMALL, "tau_end": 3.0}, {**SMALL, "tau_init": 0.3, "tau_end": 3.0}),
        "tau_end": (SMALL, {**SMALL, "tau_end": 9.0}),
        "steps": ({**SMALL, "tau_end": 9.0}, {**SMALL, "tau_end": 9.0, "steps": 40}),
        "seed": (SMALL, {**SMALL, "seed": 7}),
    }
    more = ({**SMALL, "budget": 5, "recent": 0.0}, {**SMALL, "budget": 25, "recent": 0.6})
    slides: ClassVar = {**SMALL, "budget": 4}
    long = 560  # more than one block of queries

    def own_budget(self) -> float:
        return 0.6

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        received = self.memory.setdefault((at.layer, g), {})
        tau = self.temperature(at, g)
        for h in at.query_heads(g):
            for i in at.new:
                seen = at.seen(i, at.held[g])
                scores = at.scores(h, i, seen).tolist()
                noise = self.noise(at.layer, h, i, seen)
                noisy = [(s + x) / tau for s, x in zip(scores, noise, strict=True)]
                largest = max(noisy)
                exps = [math.exp(x - largest) for x in noisy]
                total = sum(exps)
                for j, x in zip(seen, exps, strict=True):
                    received[j] = received.get(j, 0.0) + x / total
        recent = max(1, math.ceil(round(at.budget * self.cfg.recent, 9)))
        return {j: received[j] for j in at.lasting(g)}, [j for j in at.lasting(g) if j >= at.n - recent]

    def temperature(self, at: Moment, g: int) -> float:
        cfg, key = self.cfg, ("step", at.layer, g)
        self.memory[key] = 0 if at.fed > 1 else self.memory.get(key, -1) + 1
        return cfg.tau_init + (cfg.tau_end - cfg.tau_init) * min(1.0, self.memory[key] / cfg.steps)

    def noise(self, layer: int, h: int, i: int, tokens: list[int]) -> Iterator[float]:
        of_query = mixed(i, mixed(mixed(h, layer + 1), self.cfg.seed))
        for j in tokens:
            bits = (of_query ^ mixed(j + 1, 0)) * 0x045D9F3B % 2**32 >> 9
            # 23 bits, of which the first is the sign
            yield -math.log(-math.log(((bits + 2**22) % 2**23 + 0.5) / 2**23))
