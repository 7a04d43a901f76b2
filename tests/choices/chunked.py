"""Chunks over SnapKV: each chunk keeps its best, as many as its length asks for of the budget."""

from typing import ClassVar

from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment

SMALL = {"budget": 8, "window": 3, "pool": 3, "length": 5}


class Written(Below):
    moves: ClassVar = {"length": (SMALL, {**SMALL, "length": 9})}
    # chunks of one token, one chunk, more chunks than tokens to keep, a share of the text
    more = (
        {**SMALL, "length": 1},
        {**SMALL, "length": 90},
        {**SMALL, "budget": 3, "window": 1},
        {"budget": 0.4, "window": 2, "pool": 5, "length": 4},
    )
    slides: ClassVar = {"budget": 4, "window": 1, "pool": 3, "length": 3}

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        score, always = super().ranks(at, g)
        chunks: dict[int, list[int]] = {}
        for j in sorted(score):
            chunks.setdefault(j // self.cfg.chunked.length, []).append(j)
        standing = {}
        for number, tokens in chunks.items():
            long = len(range(at.n)[number * self.cfg.chunked.length :][: self.cfg.chunked.length])
            tokens.sort(key=lambda j: (j not in always, 0.0 if j in always else -score[j], j))
            standing |= {j: -(place + 0.5) / long for place, j in enumerate(tokens)}
        return standing, always
