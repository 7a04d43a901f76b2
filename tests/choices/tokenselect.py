"""TokenSelect: the first and the last tokens, and of those between the best by a vote of all heads together."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 8, "init": 2, "local": 3, "k": 3, "reuse": None}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "init": (SMALL, {**SMALL, "init": 0}),
        "local": (SMALL, {**SMALL, "local": 1}),
        "k": (SMALL, {**SMALL, "k": 12}),
        "reuse": (SMALL, {**SMALL, "reuse": 0.2}),
        "vote": (SMALL, {**SMALL, "vote": "raw"}),
    }
    more = (
        {"init": 1, "local": 4, "k": 3, "reuse": 0.4},
        {"init": 3, "local": 3, "k": 6, "reuse": -0.9, "budget": 0.5},
        {"init": 0, "local": 1, "k": 1, "reuse": 0.0, "vote": "raw"},
    )
    slides: ClassVar = {"budget": 4, "init": 1, "local": 1, "k": 2, "reuse": 0.2}
    long = 2700

    def own_budget(self) -> int:
        return self.cfg.init + self.cfg.local + self.cfg.k

    def reads(self, at: Moment) -> list[list[int]] | None:
        # the prompt in one piece, or nothing to choose
        if at.fed == at.n or len(at.held[0]) <= at.budget + at.fed - 1:
            return None
        whole = self.cfg.init + self.cfg.local + self.cfg.k
        init = round(at.budget * self.cfg.init / whole)
        local = max(1, round(at.budget * self.cfg.local / whole))
        tokens = at.held[0]
        recent = at.n - (local + at.fed - 1)  # of every query of this forward
        ends = [j for j in tokens if j < init or j >= recent]
        middle = self.middle(at, [j for j in tokens if j not in ends], max(0, at.budget - init - local))
        return [sorted({*ends, *middle})] * len(at.q)

    def middle(self, at: Moment, between: list[int], k: int) -> list[int]:
        asks = at.plain_q[:, -1].flatten()
        if self.cfg.reuse is not None and at.layer in self.memory:
            asked, chosen = self.memory[at.layer]
            if float(torch.cosine_similarity(asks, asked, dim=0)) >= self.cfg.reuse:
                return [j for j in chosen if j in between]
        chosen = largest(self.votes(at, between), k)
        self.memory[at.layer] = asks, chosen
        return chosen

    def votes(self, at: Moment, between: list[int]) -> dict[int, float]:
        votes = dict.fromkeys(between, 0.0)
        for h in range(len(at.q)):
            mean: Tensor = sum(at.q[h, i] for i in at.new) / at.fed
            s = {j: float(at.k[at.kv_head(h), j] @ mean) * at.scale for j in between}
            if self.cfg.vote == "soft":
                top = max(s.values())
                total = sum(math.exp(x - top) for x in s.values())
                s = {j: math.exp(x - top) / total for j, x in s.items()}
            votes = {j: vote + s[j] for j, vote in votes.items()}
        return votes
