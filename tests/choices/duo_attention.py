"""DuoAttention: retrieval heads hold all, the others sinks and recent tokens, as many as the budget pays for."""

from typing import Any, ClassVar

import torch

from regard.attaching.calibrate import repeated
from regard.testing.cache.choice import moment_of_text, projected
from regard.testing.cache.definition import Definition, Moment

HEADS = ((1, 0), (0, 1), (2, 0), (1, 1), (0, 0), (2, 1))
RULE = {"heads": HEADS, "sinks": 1, "window": 6}
REPEATS = 4


class Written(Definition):
    moves: ClassVar = {
        "heads": (RULE, {**RULE, "heads": HEADS[::-1]}),
        "budget": ({**RULE, "budget": 8}, {**RULE, "budget": 0.5}),
        "sinks": (RULE, {**RULE, "sinks": 3}),
        "window": (RULE, {**RULE, "window": 9}),
        "retrieval": (RULE, {**RULE, "retrieval": 0.2}),
    }
    # heads that are measured; a head that this model does not have; more sinks than a budget has room for
    more = (
        {"sinks": 1, "window": 6},
        {**RULE, "heads": ((9, 0), *HEADS), "sinks": 0},
        {**RULE, "budget": 3, "sinks": 7},
        {**RULE, "budget": 0.7, "retrieval": 0.4},
    )
    slides: ClassVar = {**RULE, "budget": 4, "window": 2}
    long = 340

    def __init__(self, cfg: Any, model: Any) -> None:
        super().__init__(cfg, model)
        config = model.config
        self.layers, self.groups = config.num_hidden_layers, config.num_key_value_heads
        heads = by_induction(model) if cfg.heads is None else cfg.heads
        self.order = [(layer, g) for layer, g in heads if layer < self.layers and g < self.groups]

    def parts(self, at: Moment) -> tuple[int, int]:
        cfg, total = self.cfg, self.layers * self.groups
        whole = round(cfg.retrieval * total)
        if cfg.budget is None:
            return whole, cfg.sinks + cfg.window
        n = at.n if at.window is None else min(at.n, at.window)
        least = max(1, min(at.budget, cfg.sinks + 1))
        while whole and whole * n + (total - whole) * least > at.budget * total:
            whole -= 1
        return whole, (at.budget * total - whole * n) // (total - whole) if whole < total else 0

    def keeps(self, at: Moment) -> list[list[int]]:
        whole, tokens = self.parts(at)
        return [
            list(held) if (at.layer, g) in self.order[:whole] else self.cut(at, held, tokens)
            for g, held in enumerate(at.held)
        ]

    def cut(self, at: Moment, held: tuple[int, ...], tokens: int) -> list[int]:
        held = tuple(j for j in held if at.window is None or j > at.n - at.window)
        if len(held) <= tokens:
            return list(held)
        sinks = min(self.cfg.sinks, tokens - 1)
        return [j for j in held if j < sinks or j >= at.n - (tokens - sinks)]


def by_induction(model: Any) -> list[tuple[int, int]]:
    """KV heads, best first."""
    found = induction_scores(model)
    return sorted(found, key=lambda head: -found[head])


def induction_scores(model: Any) -> dict[tuple[int, int], float]:
    """Of each KV head what a query head of it gives, at most, to the tokens that followed its own before."""
    length = (model.config.max_position_embeddings - 1) // REPEATS
    ids = repeated(model, length, REPEATS, 0)
    with projected(model) as noted, torch.no_grad():
        model(ids)
    n, found = ids.shape[1], {}
    for layer, parts in enumerate(noted):
        at = moment_of_text(model, layer, *(parts[name][0][0] for name in ("q", "k", "v")))
        for h in range(len(at.q)):
            weights = [at.weights(h, i, list(range(i + 1))) for i in range(n - length, n)]
            mass = sum(
                float(w[len(w) - 1 - back * length + 1]) for w in weights for back in range(1, REPEATS)
            )
            head = layer, at.kv_head(h)
            found[head] = max(found.get(head, 0.0), mass)
    return found
