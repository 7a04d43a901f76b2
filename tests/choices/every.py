"""Every n tokens over Knorm: cut to the shortest keys after prompts, and where the text passes a multiple of n."""

from typing import ClassVar

from tests.choices.knorm import Written as Below

from regard.testing.cache.definition import Moment, best_of

SMALL = {"budget": 8, "n": 3}


class Written(Below):
    moves: ClassVar = {
        "n": (SMALL, {**SMALL, "n": 5}),
        "prompt": ({**SMALL, "n": 7}, {**SMALL, "n": 7, "prompt": False}),
    }
    # each token, a share of the text, none but the prompts, nothing until the second turn
    more = (
        {**SMALL, "n": 1},
        {"budget": 0.4, "n": 4, "prompt": False},
        {**SMALL, "n": 90},
        {**SMALL, "n": 25, "prompt": False},
    )
    slides: ClassVar = {"budget": 3, "n": 2}
    phase = "both"

    def keeps(self, at: Moment) -> list[list[int]] | None:
        cfg = self.cfg.every
        passes = any(length % cfg.n == 0 for length in range(at.n - at.fed + 1, at.n + 1))
        if not passes and not (cfg.prompt and at.fed > 1):
            return None
        return [best_of(*self.ranks(at, g), at.budget) for g in range(len(at.k))]
