"""HeadKV over SnapKV: one budget of the whole model, whose pool goes to heads by what they are said to matter."""

import math
from typing import Any, ClassVar

from tests.choices.duo_attention import induction_scores
from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment

# of three layers with two cache heads, each read by two query heads
ROWS = ((0.1, 0.5), (0.0, 0.3), (0.9, 0.2))
FOUR = ((0.1, 0.3, 0.0, 0.4), (0.2, 0.2, 0.1, 0.0), (0.7, 0.0, 0.3, 0.6))
SMALL = {"budget": 8, "window": 3, "pool": 3, "importance": ROWS}


class Written(Below):
    moves: ClassVar = {
        "importance": (SMALL, {**SMALL, "importance": FOUR}),
        "beta": (SMALL, {**SMALL, "beta": 4.0}),
        "temperature": (SMALL, {**SMALL, "temperature": 0.3}),
    }
    # measured; a head that the text fills; all heads alike; a window longer than the budget; heads of no importance
    more = (
        {"budget": 8, "window": 3, "pool": 3},
        {"budget": 0.6, "window": 2, "pool": 3, "importance": ROWS, "beta": 1.0, "temperature": 2.0},
        {**SMALL, "temperature": 0.0},
        {"budget": 3, "window": 5, "pool": 1, "importance": FOUR},
        {**SMALL, "importance": ((0.0, 0.0),) * 3},
        {**SMALL, "importance": ((0.0, 1.0), (0.0, 0.0), (0.0, 0.0)), "beta": 1.0},
    )
    slides: ClassVar = {"budget": 4, "window": 2, "pool": 3, "importance": ROWS}

    def __init__(self, cfg: Any, model: Any) -> None:
        super().__init__(cfg, model)
        config, own = model.config, cfg.headkv
        heads = [(i, g) for i in range(config.num_hidden_layers) for g in range(config.num_key_value_heads)]
        if own.importance is None:
            measured = induction_scores(model)
            raw = {head: measured[head] for head in heads}
        else:
            share = len(own.importance[0]) // config.num_key_value_heads
            raw = {(i, g): sum(own.importance[i][g * share : (g + 1) * share]) / share for i, g in heads}
        self.weight = {head: x**own.temperature for head, x in raw.items()}

    def shares(self, at: Moment, ranked: list) -> list[int]:
        sure = min(at.budget, max(len(always) for _, always in ranked))
        text = at.n if at.window is None else min(at.n, at.window)
        given = math.floor(round((at.budget - sure) / self.cfg.headkv.beta, 9))
        least = at.budget - given
        extra = spread(self.weight, text - least, given * len(self.weight))
        return [least + extra[at.layer, g] for g in range(len(ranked))]


def spread(weight: dict, most: int, pool: int) -> dict:
    """Whole numbers that sum to the pool, in proportion, none above `most`: what one cannot take the others get."""
    top, given, open_ = max(weight.values()), dict.fromkeys(weight, 0.0), dict(weight)
    if top == 0:
        open_ = dict.fromkeys(weight, 1.0)
    open_ = {head: max(w, 1e-9 * top) for head, w in open_.items()}
    left = float(min(pool, most * len(weight)))
    while open_:
        total = sum(open_.values())
        full = [head for head, w in open_.items() if left * w / total >= most - 1e-9]
        if not full:
            given |= {head: left * w / total for head, w in open_.items()}
            break
        given |= dict.fromkeys(full, float(most))
        left -= most * len(full)
        open_ = {head: w for head, w in open_.items() if head not in full}
    whole = {head: math.floor(x + 1e-9) for head, x in given.items()}
    rest = sorted(given, key=lambda head: -round((given[head] - whole[head]) * 1e9))
    for head in rest[: min(pool, most * len(weight)) - sum(whole.values())]:
        whole[head] += 1
    return whole
