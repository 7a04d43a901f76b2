"""Expected Attention: the attention of a normal query, rotated to the positions to come, times the length of values."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "future": 5, "sinks": 2, "epsilon": 0.01}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "future": (SMALL, {**SMALL, "future": 40}),
        "sinks": (SMALL, {**SMALL, "sinks": 0}),
        "epsilon": (SMALL, {**SMALL, "epsilon": 1.0}),
    }
    # more first tokens than the budget has room for, and than the first prompt has
    more = ({**SMALL, "budget": 3, "sinks": 4}, {**SMALL, "sinks": 20}, {**SMALL, "budget": 1, "future": 1})
    slides: ClassVar = {**SMALL, "budget": 3, "sinks": 1}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def mean_rotation(self, at: Moment) -> Tensor:
        """[D, D] A, with which A x is x at the positions to come, on average."""
        key = at.n, at.layer
        if key not in self.memory:
            width = at.q.shape[-1]
            parts = [
                at.rotate(torch.eye(width, dtype=at.q.dtype), torch.full((width,), at.n + t))
                for t in range(self.cfg.future)
            ]
            self.memory[key] = (sum(parts) / self.cfg.future).T
        return self.memory[key]

    def normal(self, at: Moment, h: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the queries of head h."""
        width = at.q.shape[-1]
        asked = [at.plain_q[h, i] for i in at.new if i >= self.cfg.sinks]
        mean, spread = torch.zeros(width).double(), torch.zeros(width, width).double()
        for q in asked:
            mean = mean + q / len(asked)
        for q in asked:
            spread = spread + torch.outer(q - mean, q - mean) / len(asked)
        rotation = self.mean_rotation(at)
        return rotation @ mean, rotation @ spread @ rotation.T

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        tokens, sinks = at.lasting(g), self.cfg.sinks
        shares, heads = dict.fromkeys(tokens, 0.0), at.query_heads(g)
        for h in heads:
            mean, spread = self.normal(at, h)
            z = {}
            for j in tokens:
                if j >= sinks:
                    key = at.k[g, j] * at.scale
                    z[j] = float(key @ mean + key @ spread @ key / 2)
            top = max(z.values(), default=0.0)
            total = sum(math.exp(x - top) for x in z.values())
            for j, x in z.items():
                shares[j] += math.exp(x - top) / total / len(heads)
        score = {j: (shares[j] + self.cfg.epsilon) * float(at.v[g, j].norm()) for j in tokens}
        return score, [j for j in tokens if j == at.n - 1 or j < min(sinks, at.budget - 1)]
