"""Layer entropy over SnapKV: layers share their budgets by the entropy and the variance of their attention."""

from typing import ClassVar

from tests.choices.parts.layers_asked import preference, shared
from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment, Text

SMALL = {"budget": 8, "window": 3, "pool": 3, "queries": 4}


class Written(Below):
    moves: ClassVar = {
        "queries": (SMALL, {**SMALL, "queries": 2}),
        "spread": (SMALL, {**SMALL, "spread": 0.2}),
        "motion": (SMALL, {**SMALL, "motion": 0.2}),
    }
    # a layer that holds all; a window longer than the budget; layers that ask for about the same
    more = (
        {**SMALL, "budget": 0.8, "motion": 0.3},
        {"budget": 3, "window": 5, "pool": 1, "queries": 6},
        {**SMALL, "spread": 20.0, "motion": 20.0},
    )
    slides: ClassVar = {"budget": 4, "window": 2, "pool": 3, "queries": 3}

    def together(self, moments: list[Moment], text: Text) -> None:
        if moments[0].decodes:
            return
        own = self.cfg.layer_entropy
        wanted = [preference(at, own.queries, own.spread, own.motion) for at in moments]
        sure = [len(self.ranks(at, 0)[1]) for at in moments]
        self.tokens = shared(moments, wanted, sure)

    def shares(self, at: Moment, ranked: list) -> list[int]:
        return [self.tokens[at.layer]] * len(ranked)
