"""StreamingLLM: the first s tokens and the last w; a key stands at its slot, not at its place in the text."""

from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {
        "sinks": ({"budget": 8, "sinks": 3}, {"budget": 8, "sinks": 1}),
        "window": ({"sinks": 2, "window": 4}, {"sinks": 2, "window": 6}),
        "budget": ({"budget": 8, "sinks": 3}, {"budget": 0.4, "sinks": 3}),
        "positions": ({"budget": 8, "sinks": 3}, {"budget": 8, "sinks": 3, "positions": "text"}),
    }
    more = ({"budget": 8, "sinks": 0}, {"budget": 3, "sinks": 4}, {"budget": 1, "sinks": 1})
    slides: ClassVar = {"budget": 4, "sinks": 2}
    long = 520

    def own_budget(self) -> int:
        return self.cfg.sinks + self.cfg.window

    def keeps(self, at: Moment) -> list[list[int]]:
        kept = []
        for g in range(len(at.k)):
            tokens = at.lasting(g)
            # as many as are there: one that is gone leaves its room to the window
            sinks = [j for j in tokens if j < self.cfg.sinks][: at.budget - 1]
            recent = [j for j in tokens if j >= at.n - (at.budget - len(sinks))]
            kept.append(sorted({*sinks, *recent}))
        return kept

    def answer(self, at: Moment, h: int, i: int, tokens: list[int]) -> Tensor:
        g = at.kv_head(h)
        stand = torch.arange(len(tokens)) if self.cfg.positions == "slot" else torch.tensor(tokens)
        keys, query = at.rotate(at.plain_k[g][tokens], stand), at.rotate(at.plain_q[h, i : i + 1], stand[-1:])
        return (keys @ query[0] * at.scale).softmax(0) @ at.v[g][tokens]
