"""KIVI: whenever `group` tokens beside the residual are exact, the oldest are put on a grid of 2 ** bits steps."""

from typing import ClassVar

import torch
from torch import Tensor

from regard.testing.cache.definition import Definition, Moment

SMALL = {"bits": 2, "group": 4, "residual": 3}


def on_grid(x: Tensor, bits: int) -> Tensor:
    """Numbers [m], each at the nearest of the steps between the least and the largest."""
    low, high = min(x.tolist()), max(x.tolist())
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return x.clone()
    return torch.tensor([low + step * round((a - low) / step) for a in x.tolist()], dtype=x.dtype)


class Written(Definition):
    moves: ClassVar = {
        "bits": (SMALL, {**SMALL, "bits": 4}),
        "group": (SMALL, {**SMALL, "group": 8}),
        "residual": (SMALL, {**SMALL, "residual": 0}),
    }
    more = ({"bits": 8, "group": 4, "residual": 1}, {"bits": 2, "group": 4, "residual": 20})
    long = 300

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        cfg = self.cfg.kivi
        exact = self.memory.setdefault(("exact", at.layer, g), [])
        exact += [j for j in at.new if j not in exact]
        exact[:] = [j for j in exact if j in held]
        found: dict[int, tuple[Tensor, Tensor]] = {}
        while len(exact) >= cfg.residual + cfg.group:
            chunk, exact[:] = exact[: cfg.group], exact[cfg.group :]
            keys = torch.stack([on_grid(at.k[g][chunk, d], cfg.bits) for d in range(at.k.shape[-1])], 1)
            size = min(cfg.group, at.v.shape[-1])
            for j, key in zip(chunk, keys):
                parts = [on_grid(part, cfg.bits) for part in at.v[g, j].split(size)]
                found[j] = key, torch.cat(parts)
        return found
