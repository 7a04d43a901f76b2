"""Q-Filters: the keys that reach furthest along the first singular vector of the prompt's queries."""

from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {"budget": ({"budget": 8}, {"budget": 0.4})}
    more = ({"budget": 1}, {"budget": 14})
    slides: ClassVar = {"budget": 3}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def direction(self, queries: Tensor) -> Tensor:
        """[D] of queries [n, D]: most of them have a positive part along it, by their sum."""
        _, _, right = torch.linalg.svd(queries, full_matrices=False)
        parts = sum(float(q @ right[0]) for q in queries)
        return right[0] if parts >= 0 else -right[0]

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        heads = at.query_heads(g)
        mean = sum(self.direction(at.q[h, list(at.new)]) for h in heads) / len(heads)
        return {
            j: sum(float(a) * float(b) for a, b in zip(at.k[g, j], mean, strict=True)) for j in at.lasting(g)
        }, [at.n - 1]
