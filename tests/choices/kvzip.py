"""KVzip: what the model attends to while it repeats the text stays, the best of all heads of all layers together."""

from typing import ClassVar

import torch

from regard.testing.cache.definition import Definition, Moment, Text

SMALL = {"budget": 8, "sinks": 2, "chunk": 7, "lead": 2, "whole": (5, 9), "part": (5, 11, 7), "answer": (4,)}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "sinks": (SMALL, {**SMALL, "sinks": 5}),
        "chunk": (SMALL, {**SMALL, "chunk": 40}),
        "lead": (SMALL, {**SMALL, "lead": 0}),
        "whole": (SMALL, {**SMALL, "whole": (90, 91, 92)}),
        "part": (SMALL, {**SMALL, "part": (60, 61)}),
        "answer": (SMALL, {**SMALL, "answer": ()}),
    }
    # fewer tokens than sinks; chunks of one token
    more = ({**SMALL, "budget": 2, "sinks": 4}, {**SMALL, "chunk": 1, "lead": 3, "budget": 0.2})
    slides: ClassVar = {**SMALL, "budget": 3}
    long = 60
    words: ClassVar = {"whole": (5, 9), "part": (5, 11, 7), "answer": (4,)}
    phase = "prefill"

    def own_budget(self) -> float:
        return 0.3

    def together(self, moments: list[Moment], text: Text) -> None:
        if moments[0].decodes:
            return
        read, n = self.memory.get("read", 0), moments[0].n
        for nth, start in enumerate(range(read, n, self.cfg.chunk)):
            chunk = range(start, min(start + self.cfg.chunk, n))
            quoted = text.ids[max(read, start - self.cfg.lead) : start] if nth else []
            asked = [*(self.cfg.part if nth else self.cfg.whole), *quoted, *self.cfg.answer]
            scores = text.again([*asked, *text.ids[chunk.start : chunk.stop]])
            for at, own in zip(moments, scores, strict=True):
                self.weigh(at, own, chunk)
        self.memory["read"] = n
        self.share_out(moments)

    def weigh(self, at: Moment, scores: torch.Tensor, chunk: range) -> None:
        """The most that a query of the pass gives to a token of the chunk, beside first tokens and the pass itself."""
        for g in range(len(at.k)):
            keys = sorted({*chunk, *range(self.cfg.sinks)} & {*at.held[g]})
            keys += range(at.n, scores.shape[-1])
            for h in at.query_heads(g):
                weights = scores[h][:, keys].softmax(-1).amax(0).tolist()
                for j, weight in zip(keys, weights, strict=True):
                    if j in chunk:
                        place = at.layer, g, j
                        self.memory[place] = max(weight, self.memory.get(place, 0.0))

    def stays(self, at: Moment, g: int) -> list[int]:
        if at.window is not None:
            return sorted(at.lasting(g))[-at.budget :]
        return [j for j in at.held[g] if j < min(self.cfg.sinks, at.budget - 1) or j == at.n - 1]

    def share_out(self, moments: list[Moment]) -> None:
        """How many of the best tokens of all are each head's."""
        tokens = []
        for at in moments:
            for g in range(len(at.k)):
                stays = self.stays(at, g)
                tokens += [
                    (j not in stays, -self.memory.get((at.layer, g, j), 0.0), at.layer, g)
                    for j in at.lasting(g)
                ]
        best = sorted(tokens)[: sum(at.budget * len(at.k) for at in moments)]
        self.counts = {
            at.layer: [sum(t[2:] == (at.layer, g) for t in best) for g in range(len(at.k))] for at in moments
        }

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        return {j: self.memory.get((at.layer, g, j), 0.0) for j in at.lasting(g)}, self.stays(at, g)

    def shares(self, at: Moment, ranked: list) -> list[int]:
        return self.counts[at.layer]
