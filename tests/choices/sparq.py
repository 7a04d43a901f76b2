"""SparQ Attention: a step reads the newest tokens and the best by a few components, and the mean value for the rest."""

import math
from typing import ClassVar

from torch import Tensor

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 6, "rank": 3}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "rank": (SMALL, {**SMALL, "rank": 2}),
        "local": (SMALL, {**SMALL, "local": 0.7}),
    }
    # its own token alone; all components; the newest tokens alone
    more = (
        {"budget": 1, "rank": 2},
        {"budget": 5, "rank": 32, "local": 0.0},
        {"budget": 4, "rank": 1, "local": 1.0},
    )
    long = 150

    def own_budget(self) -> int:
        return 128

    def answer(self, at: Moment, h: int, i: int, tokens: list[int]) -> Tensor:
        if not at.decodes or at.n <= at.budget:
            return super().answer(at, h, i, tokens)
        g = at.kv_head(h)
        read, rough = self.read(at, g)
        alpha = sum(rough[h][j] for j in read)
        return alpha * (at.weights(h, i, read) @ at.v[g, read]) + (1 - alpha) * at.v[g].sum(0) / at.n

    def read(self, at: Moment, g: int) -> tuple[list[int], dict[int, list[float]]]:
        """The tokens that KV head g reads, and the rough weights of each of its query heads."""
        width, heads = at.k.shape[-1], at.query_heads(g)
        size = {c: sum(abs(float(at.q[h, -1, c])) for h in heads) for c in range(width)}
        large, rough = largest(size, self.cfg.rank), {}
        for h in heads:
            q = at.q[h, -1]
            share = sum(abs(float(q[c])) for c in large) / float(q.abs().sum())
            scores = (at.k[g][:, large] @ q[large]).tolist()
            s = [math.exp(x * at.scale / math.sqrt(share)) for x in scores]
            total = sum(s)
            rough[h] = [x / total for x in s]
        newest = range(at.n - max(1, round(self.cfg.local * at.budget)), at.n)
        votes = {j: sum(rough[h][j] for h in heads) for j in range(at.n) if j not in newest}
        return [*largest(votes, at.budget - len(newest)), *newest], rough
