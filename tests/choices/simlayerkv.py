"""SimLayerKV: after a prompt a lazy layer keeps sinks and recent tokens, any other all, as far as budgets reach."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

RULE = {"sinks": 1, "window": 4, "last": 3, "threshold": 0.35}
SMALL = {**RULE, "budget": 8}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {**SMALL, "budget": 0.4}),
        "sinks": (RULE, {**RULE, "sinks": 3}),
        "window": (RULE, {**RULE, "window": 6}),
        "last": (RULE, {**RULE, "last": 1}),
        "threshold": (RULE, {**RULE, "threshold": 0.45}),
    }
    # all layers lazy, none, budgets below a lazy layer's tokens, a budget that covers some rows
    more = (
        {**RULE, "threshold": 0.0},
        {**SMALL, "threshold": 1.0},
        {**SMALL, "budget": 2},
        {**SMALL, "budget": 20},
    )
    slides: ClassVar = {**SMALL, "budget": 3}
    long = 1100
    phase = "prefill"

    def keeps(self, at: Moment) -> list[list[int]] | None:
        if at.decodes:
            return None
        cfg, held = self.cfg, [at.lasting(g) for g in range(len(at.k))]
        most = max(len(tokens) for tokens in held)
        available = at.budget + (self.memory["left"] if at.layer else 0)
        tokens = min(available, cfg.sinks + cfg.window) if self.lazy(at, held) else available
        if cfg.budget is not None and at.budget >= most:
            tokens = most
        self.memory["left"] = available - min(tokens, most)
        return [self.ends(at, stored, tokens) for stored in held]

    def lazy(self, at: Moment, held: list[list[int]]) -> bool:
        near = whole = 0.0
        for h in range(len(at.q)):
            for i in at.new[-self.cfg.last :]:
                seen = at.seen(i, at.held[at.kv_head(h)])
                for j, weight in zip(seen, at.weights(h, i, seen).tolist(), strict=True):
                    if j in held[at.kv_head(h)]:
                        whole += weight
                        near += weight if j < self.cfg.sinks or j >= at.n - self.cfg.window else 0.0
        return near > self.cfg.threshold * whole

    def ends(self, at: Moment, stored: list[int], tokens: int) -> list[int]:
        if len(stored) <= tokens:
            return stored
        sinks = min(sum(j < self.cfg.sinks for j in stored), tokens - 1)
        return [j for place, j in enumerate(stored) if place < sinks or j >= at.n - (tokens - sinks)]
