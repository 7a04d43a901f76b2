"""MorphKV: the last w tokens, and the best of the others by the attention of these w over what is held now."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment

SMALL = {"budget": 8, "window": 3}


class Written(Definition):
    moves: ClassVar = {
        "budget": (SMALL, {"budget": 0.4, "window": 3}),
        "window": (SMALL, {"budget": 8, "window": 5}),
        "fuse": (SMALL, {**SMALL, "fuse": "max"}),
    }
    # a window longer than the budget, and than a question; one token
    more = (
        {"budget": 4, "window": 7},
        {"budget": 12, "window": 9, "fuse": "max"},
        {"budget": 2, "window": 1},
    )
    slides: ClassVar = {"budget": 4, "window": 2}
    long = 2010

    def own_budget(self) -> int:
        return 2000

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        tokens, cfg = at.lasting(g), self.cfg
        fused = dict.fromkeys(tokens, 0.0)
        for i in range(max(0, at.n - cfg.window), at.n):
            seen = [j for j in tokens if j <= i]
            vote = sum(at.weights(h, i, seen) for h in at.query_heads(g)).tolist()
            for j, share in zip(seen, vote, strict=True):
                fused[j] = fused[j] + share if cfg.fuse == "sum" else max(fused[j], share)
        return fused, [j for j in tokens if j >= at.n - min(cfg.window, at.budget)]
