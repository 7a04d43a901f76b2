"""ThinK: keys that left the window have zeros in the channels that the last prompt's queries used least."""

from typing import ClassVar

from torch import Tensor

from regard.testing.cache.definition import Definition, Moment

SMALL = {"sparsity": 0.5, "window": 3}


class Written(Definition):
    moves: ClassVar = {
        "sparsity": (SMALL, {**SMALL, "sparsity": 0.8}),
        "window": (SMALL, {**SMALL, "window": 6}),
    }
    more = ({"sparsity": 0.3, "window": 1}, {"sparsity": 0.5, "window": 20})
    long = 60

    def weigh(self, at: Moment, g: int) -> None:
        name = "weights", at.layer, g
        if name in self.memory:
            return
        weights = []
        for d in range(at.k.shape[-1]):
            queries = [
                float(at.q[h, i, d]) ** 2 for h in at.query_heads(g) for i in at.new[-self.cfg.think.window :]
            ]
            keys = [float(at.k[g, j, d]) ** 2 for j in at.held[g]]
            weights.append(sum(queries) / len(queries) * sum(keys) / len(keys))
        self.memory[name] = weights

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        self.weigh(at, g)
        cfg, done = self.cfg.think, self.memory.setdefault(("done", at.layer, g), set())
        old = [j for j in held[: max(0, len(held) - cfg.window)] if j not in done]
        if old and ("out", at.layer, g) not in self.memory:
            weights = self.memory["weights", at.layer, g]
            order = sorted(range(len(weights)), key=lambda d: (weights[d], -d))
            self.memory["out", at.layer, g] = order[: int(len(weights) * cfg.sparsity)]
        found = {}
        for j in old:
            key = at.k[g, j].clone()
            key[self.memory["out", at.layer, g]] = 0
            found[j] = key, at.v[g, j]
            done.add(j)
        return found
