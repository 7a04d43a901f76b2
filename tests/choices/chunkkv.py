"""ChunkKV over SnapKV: chunks of the text by their mean vote, one choice for all heads, or for several layers."""

from typing import ClassVar

from tests.choices.snapkv import Written as Below

from regard.testing.cache.definition import Moment

SMALL = {"budget": 9, "window": 2, "pool": 1, "chunk": 3}


class Written(Below):
    moves: ClassVar = {"chunk": (SMALL, {**SMALL, "chunk": 4}), "reuse": (SMALL, {**SMALL, "reuse": 2})}
    # a budget of half a chunk; one chunk for the whole text; all layers one choice
    more = (
        {"budget": 0.4, "window": 1, "pool": 3, "chunk": 2},
        {"budget": 4, "window": 1, "pool": 1, "chunk": 5, "reuse": 3},
        {**SMALL, "chunk": 64},
        {"budget": 5, "window": 7, "pool": 1, "chunk": 3},
    )
    slides: ClassVar = {"budget": 4, "window": 1, "pool": 1, "chunk": 2}

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        cfg = self.cfg.chunkkv
        of_heads = [super(Written, self).ranks(at, h) for h in range(len(at.k))]
        group = at.n, at.layer // cfg.reuse
        if group not in self.memory:
            parts: dict[int, list[float]] = {}
            for votes, always in of_heads:
                for j, vote in votes.items():
                    if j not in always:
                        parts.setdefault(j // cfg.chunk, []).append(vote)
            self.memory[group] = {i: round(sum(x) / len(x), 9) for i, x in parts.items()}
        votes, always = of_heads[g]
        return {j: self.memory[group].get(j // cfg.chunk, 0.0) for j in votes}, always
