"""SnapKV after prompts, then H2O after each generated token, within one budget."""

from typing import ClassVar

from tests.choices import h2o, snapkv

from regard.testing.cache.definition import Definition, Moment


class Written(Definition):
    moves: ClassVar = {}
    more = (
        {"budget": 8, "window": 3, "pool": 3},
        {"budget": 0.4, "window": 2, "pool": 1},
        {"budget": 9, "window": 4, "pool": 3, "recent": 0.2},
    )
    slides: ClassVar = {"budget": 3, "window": 1, "pool": 3}
    long = 1040

    def __init__(self, cfg, model) -> None:
        super().__init__(cfg, model)
        self.first, self.second = snapkv.Written(cfg, model), h2o.Written(cfg.h2o, model)

    def own_budget(self) -> int:
        return 1024

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]]:
        later = self.second.ranks(at, g)  # sums up in every forward
        return later if at.decodes else self.first.ranks(at, g)
