"""Ada-KV over SnapKV: of all tokens of a layer's heads together the best stay, with a floor for each head."""

from typing import ClassVar

from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment

SMALL = {"budget": 8, "window": 3, "pool": 3}


class Written(Below):
    moves: ClassVar = {"floor": ({**SMALL, "floor": 0.1}, {**SMALL, "floor": 0.9})}
    more = ({"budget": 5, "window": 7, "pool": 1}, {"budget": 0.4, "window": 2, "pool": 5, "floor": 0.0})

    def shares(self, at: Moment, ranked: list) -> list[int]:
        sure, all_tokens = int(at.budget * self.cfg.adakv.floor), []
        for g, (score, always) in enumerate(ranked):
            # what stays in any case first, then by score, then by place
            order = sorted(score, key=lambda j: (j not in always, -score[j] if j not in always else 0, j))
            all_tokens += [
                (place >= sure and j not in always, -score[j] if j not in always else 0, g, j)
                for place, j in enumerate(order)
            ]
        return self.counted(sorted(all_tokens)[: at.budget * len(ranked)], len(ranked))

    @staticmethod
    def counted(chosen: list, heads: int) -> list[int]:
        return [sum(token[2] == g for token in chosen) for g in range(heads)]
