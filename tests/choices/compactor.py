"""Compactor: the first and last tokens, and those between by leverage and non-causal attention together."""

from typing import ClassVar

from tests.choices.leverage import leverages
from tests.choices.non_causal_attention import norm, worths

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "first": 1, "last": 2, "chunk": 5}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "blend": (SMALL, {**SMALL, "blend": 3.0}),
        "chunk": (SMALL, {**SMALL, "chunk": 3}),
        "first": (SMALL, {**SMALL, "first": 3}),
        "last": (SMALL, {**SMALL, "last": 4}),
        "ridge": (SMALL, {**SMALL, "ridge": 30.0}),
    }
    # no room for what always stays; leverage alone does not decide; a question that is shorter than what it keeps
    more = (
        {"budget": 4, "first": 3, "last": 3, "chunk": 4},
        {"budget": 2, "first": 2, "last": 5, "chunk": 4},
        {"budget": 17, "first": 0, "last": 0, "blend": 0.0},
        {"budget": 10, "first": 2, "last": 1, "blend": 8.0, "chunk": 7},
    )
    slides: ClassVar = {"budget": 4, "first": 1, "last": 1, "chunk": 3}
    long = 280
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.5

    def keeps(self, at: Moment) -> list[list[int]] | None:
        if not at.decodes:
            self.memory[at.layer] = self.blended(at)
        return super().keeps(at)

    def blended(self, at: Moment) -> list[dict[int, float]]:
        """By head the scores of the tokens between the first and the last."""
        cfg, outlying, worth = self.cfg, [], []
        for g in range(len(at.k)):
            noted = self.memory.setdefault((at.layer, g), {})
            fed = [j for j in at.new if cfg.first <= j < at.n - cfg.last]
            noted |= worths(at, g, fed, cfg.chunk)
            between = [j for j in at.lasting(g) if cfg.first <= j < at.n - cfg.last]
            worth.append({j: noted.get(j, norm(at.v[g, j].tolist())) for j in between})
            outlying.append(leverages({j: at.plain_k[g, j].tolist() for j in between}, cfg.ridge))
        pairs = zip(standardised(outlying), standardised(worth), strict=True)
        return [{j: cfg.blend * one[j] + other[j] for j in one} for one, other in pairs]

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        last = min(at.budget, max(1, self.cfg.last))
        first = min(self.cfg.first, at.budget - last)
        tokens, score = at.lasting(g), self.memory[at.layer][g]
        return {j: score.get(j, 0.0) for j in tokens}, [j for j in tokens if j < first or j >= at.n - last]


def standardised(heads: list[dict[int, float]]) -> list[dict[int, float]]:
    every = [x for head in heads for x in head.values()]
    if len(every) < 2:
        return [dict.fromkeys(head, 0.0) for head in heads]
    mean = sum(every) / len(every)
    deviation = (sum((x - mean) ** 2 for x in every) / (len(every) - 1)) ** 0.5
    return [{j: (x - mean) / max(deviation, 1e-6) for j, x in head.items()} for head in heads]
