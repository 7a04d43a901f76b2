"""Non-causal attention: after a prompt the tokens that the queries of their chunk attend to most, before and after."""

import math
from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment


def norm(x: list[float]) -> float:
    return math.sqrt(sum(c * c for c in x))


def received(at: Moment, g: int, tokens: list[int], chunk: int) -> dict[int, float]:
    """What tokens that follow each other receive from the queries of their chunk, a mean over heads."""
    found = dict.fromkeys(tokens, 0.0)
    heads = at.query_heads(g)
    for begin in range(0, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        for h in heads:
            queries, keys = at.q[h, part].tolist(), at.k[g, part].tolist()
            for q in queries:
                raw = [sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
                largest = max(raw)
                exps = [math.exp(x - largest) for x in raw]
                total = sum(exps)
                for j, x in zip(part, exps, strict=True):
                    found[j] += x / total / len(heads)
    return found


def worths(at: Moment, g: int, tokens: list[int], chunk: int) -> dict[int, float]:
    by_value = {j: a * norm(at.v[g, j].tolist()) for j, a in received(at, g, tokens, chunk).items()}
    beside = {j: [by_value[i] for i in (j - 1, j, j + 1) if i in by_value] for j in tokens}
    return {j: sum(some) / len(some) for j, some in beside.items()}


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 8, "chunk": 5}, {"budget": 0.4, "chunk": 5}),
        "chunk": ({"budget": 8, "chunk": 5}, {"budget": 8, "chunk": 3}),
    }
    more = ({"budget": 1}, {"budget": 17, "chunk": 1}, {"budget": 12, "chunk": 6})
    slides: ClassVar = {"budget": 3, "chunk": 4}
    long = 270
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        noted = self.memory.setdefault((at.layer, g), {})
        noted |= worths(at, g, list(at.new), self.cfg.chunk)
        alone = {j: norm(at.v[g, j].tolist()) for j in at.lasting(g)}
        return {j: noted.get(j, alone[j]) for j in at.lasting(g)}, [at.n - 1]
