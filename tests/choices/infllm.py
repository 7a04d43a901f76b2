"""InfLLM: the first tokens, the nearest, and blocks whose representative tokens the step's queries ask for most."""

from typing import ClassVar

import torch

from regard.testing.cache.definition import Definition, Moment, largest

SMALL = {"budget": 11, "init": 1, "local": 3, "block": 2, "blocks": 3, "representatives": 1}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "init": (SMALL, {**SMALL, "init": 3}),
        "local": (SMALL, {**SMALL, "local": 6}),
        "block": (SMALL, {**SMALL, "block": 3}),
        "blocks": (SMALL, {**SMALL, "blocks": 5}),
        "representatives": ({**SMALL, "block": 3}, {**SMALL, "block": 3, "representatives": 2}),
    }
    more = (
        {"init": 2, "local": 4, "block": 2, "blocks": 2, "representatives": 2},
        {"init": 0, "local": 1, "block": 3, "blocks": 1, "representatives": 5, "budget": 0.5},
        # no room for a block
        {"init": 2, "local": 3, "block": 8, "blocks": 1, "budget": 6},
    )
    slides: ClassVar = {"budget": 4, "init": 0, "local": 1, "block": 2, "blocks": 1, "representatives": 1}
    long = 6440

    def whole(self) -> int:
        cfg = self.cfg
        return cfg.init + cfg.local + cfg.blocks * cfg.block + cfg.block - 1

    def own_budget(self) -> int:
        return self.whole()

    def reads(self, at: Moment) -> list[list[int]] | None:
        cfg, tokens = self.cfg, at.held[0]
        init = round(at.budget * cfg.init / self.whole())
        local = max(1, round(at.budget * cfg.local / self.whole()))
        self.hear(at)
        self.represent(at, init)
        room = at.budget + at.fed - 1
        if at.fed == at.n or len(tokens) <= room:
            return None
        first = at.n - at.fed  # of this forward's queries
        far = [b for b in self.memory[at.layer, "blocks"] if init + (b + 1) * cfg.block <= first - local + 1]
        start = max(init + (max(far) + 1 if far else 0) * cfg.block, at.n - (room - init))
        ends = {j for j in tokens if j < init or j >= start}
        scores = {b: self.score(at, b) for b in far if any(self.block_of(j, init) == b for j in tokens)}
        best = largest(scores, (room - init - (at.n - start)) // cfg.block)
        return [sorted({*ends, *(j for j in tokens if self.block_of(j, init) in best)})] * len(at.q)

    def block_of(self, j: int, init: int) -> int:
        return (j - init) // self.cfg.block

    def hear(self, at: Moment) -> None:
        """Every token that is held hears the new queries that follow it, the local ones."""
        heard = self.memory.setdefault((at.layer, "heard"), {})
        first = at.n - at.fed
        for h in range(len(at.q)):
            g = at.kv_head(h)
            tokens = [j for j in at.held[g] if max(first, j + 1) < min(at.n, j + 1 + self.cfg.local)]
            until = torch.cat(
                [at.q.new_zeros(1, at.q.shape[-1]), at.q[h].cumsum(0)]
            )  # queries before each token
            asks = [until[min(at.n, j + 1 + self.cfg.local)] - until[max(first, j + 1)] for j in tokens]
            for j, query in zip(tokens, asks, strict=True):
                heard[h, j] = heard.get((h, j), 0.0) + float(query @ at.k[g, j])

    def represent(self, at: Moment, init: int) -> None:
        """The representatives of blocks with a new token, or one that still hears; where they begin anew, of all."""
        blocks = self.memory.setdefault((at.layer, "blocks"), {})
        if self.memory.get((at.layer, "init"), init) != init:
            blocks.clear()
        again = self.memory.get((at.layer, "init")) != init
        self.memory[at.layer, "init"] = init
        members: dict[int, list[int]] = {}
        for j in at.held[0]:
            if j >= init:
                members.setdefault(self.block_of(j, init), []).append(j)
        heard = self.memory[at.layer, "heard"]
        for b, tokens in members.items():
            if again or init + (b + 1) * self.cfg.block > at.n - at.fed - self.cfg.local:
                blocks[b] = [
                    largest({j: heard.get((h, j), 0.0) for j in tokens}, self.cfg.representatives)
                    for h in range(len(at.q))
                ]

    def score(self, at: Moment, b: int) -> float:
        total = 0.0
        for h, tokens in enumerate(self.memory[at.layer, "blocks"][b]):
            asks = at.q[h, at.n - at.fed :].sum(0)
            total += sum(float(asks @ at.k[at.kv_head(h), j]) for j in tokens)
        return total
