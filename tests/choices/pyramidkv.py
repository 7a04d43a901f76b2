"""PyramidKV over SnapKV: budgets that fall on a line from the first layer to the last."""

from fractions import Fraction
from math import floor
from typing import ClassVar

from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment

SMALL = {"budget": 8, "window": 3, "pool": 3}


class Written(Below):
    moves: ClassVar = {"beta": (SMALL, {**SMALL, "beta": 1.5})}
    # nothing falls; a window longer than the budget; a first layer that the text fills, and one that it does not
    more = (
        {**SMALL, "beta": 1.0},
        {"budget": 3, "window": 5, "pool": 1},
        {"budget": 0.8, "window": 2, "pool": 3, "beta": 7.0},
        {"budget": 0.3, "window": 1, "pool": 5, "beta": 2.5},
    )
    slides: ClassVar = {"budget": 4, "window": 2, "pool": 3}

    def shares(self, at: Moment, ranked: list) -> list[int]:
        sure = max(len(always) for _, always in ranked)
        rest, layers = at.budget - sure, self.model.config.num_hidden_layers
        first = 2 * rest - rest / Fraction(self.cfg.pyramidkv.beta)
        first = min(first, Fraction((at.n if at.window is None else min(at.n, at.window)) - sure))
        last = 2 * rest - first
        line = [sure + first + (last - first) * Fraction(i, layers - 1) for i in range(layers)]
        before, here = (floor(sum(line[:i], Fraction(1, 10**6))) for i in (at.layer, at.layer + 1))
        return [here - before] * len(ranked)
