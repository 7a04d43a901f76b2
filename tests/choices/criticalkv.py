"""CriticalKV over SnapKV: the first half of the budget by its votes, the second by votes times projected values."""

from math import floor
from typing import ClassVar

from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment, best_of

SMALL = {"budget": 8, "window": 2, "pool": 1}


class Written(Below):
    moves: ClassVar = {
        "first": (SMALL, {**SMALL, "first": 0.9}),
        "epsilon": ({**SMALL, "first": 0.2}, {**SMALL, "first": 0.2, "epsilon": 2.0}),
    }
    more = (
        {"budget": 0.4, "window": 2, "pool": 3, "first": 0.0},
        {"budget": 5, "window": 7, "pool": 1},
        {"budget": 10, "window": 1, "pool": 1, "first": 0.7},
    )
    slides: ClassVar = {"budget": 4, "window": 1, "pool": 1, "first": 0.25}

    def length(self, at: Moment, g: int, j: int) -> float:
        """L1 length of what the value of token j becomes, on average over the query heads that read it."""
        weight = self.model.model.layers[at.layer].self_attn.o_proj.weight.detach().double()  # [width, H * E]
        width, heads = at.v.shape[-1], at.query_heads(g)
        total = 0.0
        for h in heads:
            total += sum(map(abs, (weight[:, h * width : (h + 1) * width] @ at.v[g, j]).tolist()))
        return total / len(heads)

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        cfg = self.cfg.criticalkv
        votes, always = super().ranks(at, g)
        first = best_of(votes, always, floor(round(at.budget * cfg.first, 9)))
        critical = {
            j: (vote + cfg.epsilon) * self.length(at, g, j) for j, vote in votes.items() if j not in always
        }
        return critical, sorted({*first, *always})
