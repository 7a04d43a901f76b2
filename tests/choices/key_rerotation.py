"""Key rerotation over SnapKV: where a head lets tokens go, those that stay are turned to positions 0, 1, 2, ..."""

from typing import ClassVar

import torch
from tests.choices.snapkv import Written as Below
from torch import Tensor

from regard.testing.cache.definition import Moment


class Written(Below):
    moves: ClassVar = {}
    # of the last only the second turn of some rows is over the budget
    more = (
        {"budget": 8, "window": 3, "pool": 3},
        {"budget": 0.4, "window": 2, "pool": 1},
        {"budget": 12, "window": 3, "pool": 1},
        {"budget": 22, "window": 2, "pool": 1},
    )
    slides: ClassVar = {"budget": 3, "window": 1, "pool": 3}

    def projected(self, at: Moment, g: int, j: int) -> Tensor:
        """A key as the model turns it: its tables are float32, which a thousand tokens on are 1e-5 away."""
        key = at.plain_k[g, j]
        cos, sin = self.model.model.rotary_emb(key[None, None], torch.tensor([[j]]))
        a, b = key.chunk(2)
        return key * cos[0, 0] + torch.cat([-b, a]) * sin[0, 0]

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        keys, places = self.memory.setdefault(("turned", at.layer, g), ({}, {}))
        for j in at.new:
            keys[j], places[j] = self.projected(at, g, j), j
        if len(held) < len(at.lasting(g)):
            for place, j in enumerate(held):
                by = torch.tensor([place - places[j]])
                keys[j], places[j] = at.rotate(keys[j][None], by)[0], place
        return {j: (keys[j], at.v[g, j]) for j in held}
