"""RazorAttention: retrieval heads hold all; others sinks, a window, and a mean of what is gone, with its weight."""

from typing import Any, ClassVar

import torch

from regard.attaching.calibrate import repeated
from regard.testing.cache.choice import moment_of_text, projected
from regard.testing.cache.definition import Definition, Merged, Moment

HEADS = ((1, 0), (0, 1), (2, 0), (1, 1), (0, 0), (2, 1))
SMALL = {"heads": HEADS, "budget": 8, "sinks": 1, "window": 3}
RULE = {"heads": HEADS, "sinks": 1, "window": 6}
REPEATS = 4


class Written(Definition):
    moves: ClassVar = {
        "heads": (SMALL, {**SMALL, "heads": HEADS[::-1]}),
        "budget": (SMALL, {**SMALL, "budget": 0.5}),
        "sinks": (SMALL, {**SMALL, "sinks": 3}),
        "window": (RULE, {**RULE, "window": 12}),
        "retrieval": (RULE, {**RULE, "retrieval": 0.5}),
        "compensate": (RULE, {**RULE, "compensate": False}),
    }
    # heads that are measured; a fifth of the text is longer than the window; a window that is cut below its share
    more = (
        {"sinks": 1, "window": 6},
        {"heads": HEADS, "sinks": 2, "window": 2},
        {"heads": HEADS, "sinks": 0, "window": 17},
        {**SMALL, "compensate": False},
    )
    long = 4010

    def __init__(self, cfg: Any, model: Any) -> None:
        super().__init__(cfg, model)
        heads = by_induction(model) if cfg.heads is None else cfg.heads
        config = model.config
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        self.total = layers * groups
        self.rank = {head: i for i, head in enumerate(h for h in heads if h[0] < layers and h[1] < groups)}

    def share(self, at: Moment) -> tuple[int, int]:
        """How many heads hold all, and how many tokens each of the others may hold."""
        cfg = self.cfg
        full, one = round(cfg.retrieval * self.total), 1 if cfg.compensate else 0
        if cfg.budget is None:
            return full, cfg.sinks + max(cfg.window, at.n // 5) + one
        paid = at.budget * self.total  # slots of all heads together
        full = min(full, paid // at.n)
        return full, max((paid - full * at.n) // max(1, self.total - full), cfg.sinks + 1 + one)

    def merged(self, at: Moment) -> list[Merged | None]:
        return [self.memory.get((at.layer, g)) for g in range(len(at.k))]

    def keeps(self, at: Moment) -> list[list[int]]:
        full, most = self.share(at)
        return [
            list(tokens) if self.rank.get((at.layer, g), self.total) < full else self.cut(at, g, tokens, most)
            for g, tokens in enumerate(at.held)
        ]

    def cut(self, at: Moment, g: int, tokens: tuple[int, ...], most: int) -> list[int]:
        cfg, old = self.cfg, self.memory.get((at.layer, g))
        if most >= at.n or len(tokens) + (0 if old is None else 1) <= most:
            return list(tokens)
        window = most - cfg.sinks - (1 if cfg.compensate else 0)
        window -= min(16, window // 8)  # below the share, so that not every step cuts
        stay = [j for j in tokens if j < cfg.sinks or j >= at.n - window]
        gone = [(at.k[g, j], at.v[g, j], 1.0) for j in tokens if j not in stay] + (
            [] if old is None else [old]
        )
        if cfg.compensate:
            count = sum(weight for _, _, weight in gone)
            key, value = (sum(weight * x for x, weight in zip(xs, [w for *_, w in gone])) / count for xs in
                          ([k for k, *_ in gone], [v for _, v, _ in gone]))  # fmt: skip
            self.memory[at.layer, g] = key, value, count
        return stay


def by_induction(model: Any) -> list[tuple[int, int]]:
    """KV heads, best first: what a query head of theirs gives, at most, to the tokens that followed its own before."""
    length = (model.config.max_position_embeddings - 1) // REPEATS
    ids = repeated(model, length, REPEATS, 0)
    with projected(model) as parts, torch.no_grad():
        model(ids)
    n, found = ids.shape[1], {}
    for layer in range(len(parts)):
        at = moment_of_text(model, layer, *(parts[layer][name][0][0] for name in ("q", "k", "v")))
        for h in range(len(at.q)):
            mass = 0.0
            for i in range(n - length, n):
                weights = at.weights(h, i, list(range(i + 1)))
                mass += sum(float(weights[i - back * length + 1]) for back in range(1, REPEATS))
            head = layer, at.kv_head(h)
            found[head] = max(found.get(head, 0.0), mass / length)
    return sorted(found, key=lambda head: -found[head])
