"""Recycled Attention: every S-th step of decoding attends to all; those between read its K best and what came since."""

from typing import ClassVar

import torch

from regard.testing.cache.definition import Definition, Moment, largest


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 6, "stride": 3}, {"budget": 0.4, "stride": 3}),
        "k": ({"k": 6, "stride": 3}, {"k": 9, "stride": 3}),
        "stride": ({"budget": 6, "stride": 3}, {"budget": 6, "stride": 2}),
        "similarity": ({"budget": 6, "stride": 4}, {"budget": 6, "stride": 4, "similarity": 0.1}),
    }
    more = ({"budget": 6, "stride": 50, "similarity": -0.2}, {"budget": 1})
    slides: ClassVar = {"budget": 3, "stride": 3}
    long = 4110

    def own_budget(self) -> int:
        return self.cfg.k

    def reads(self, at: Moment) -> list[list[int]] | None:
        if not at.decodes or len(at.held[0]) <= at.budget:
            self.memory.pop(at.layer, None)
            return None
        query = at.q[:, -1]
        if at.layer in self.memory:
            step = self.memory[at.layer]
            step["age"] += 1
            alike = sum(
                float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(query, step["query"])
            ) / len(query)
            near = self.cfg.similarity is None or alike >= self.cfg.similarity
            if step["age"] < self.cfg.stride and near:
                best = [step["best"][at.kv_head(h)] for h in range(len(at.q))]
                since = {*range(step["n"], at.n)}
                return [sorted((since | {*some}) & {*at.held[0]}) for some in best]
        best = [self.best(at, g, list(tokens)) for g, tokens in enumerate(at.held)]
        self.memory[at.layer] = {"age": 0, "query": query, "n": at.n, "best": best}
        return None

    def best(self, at: Moment, g: int, tokens: list[int]) -> list[int]:
        received = sum(at.weights(h, at.n - 1, tokens) for h in at.query_heads(g))
        return largest(dict(zip(tokens, received.tolist(), strict=True)), at.budget)
