"""Where a mask is asked: at pairs of a query and a key, or at whole tiles of them. Indices are true indices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import present
from regard.core.roles import Roles

Sides = tuple[Roles | None, Roles | None]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where a predicate is asked: row, head, true query and key index, integer tensors that broadcast."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    sides: Sides = (None, None)

    def q_role(self, name: str) -> Tensor:
        """The query's label. A cross mask is given one Roles for the queries and one for the keys."""
        return present(self.sides[0], "roles label the queries").label(name, self.b, self.q)

    def k_role(self, name: str) -> Tensor:
        return present(self.sides[1], "roles label the keys").label(name, self.b, self.k)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where a rule of tiles is asked: the first and the last query and key of each, integers that broadcast."""

    b: Tensor
    h: Tensor
    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor
    sides: tuple[Roles | None, Roles | None] = (None, None)

    def q_role(self, name: str) -> tuple[Tensor, Tensor]:
        """The least and the largest label of the tile's queries."""
        return extremes(present(self.sides[0], "roles label the queries"), name, self.b, self.q0, self.q1)

    def k_role(self, name: str) -> tuple[Tensor, Tensor]:
        return extremes(present(self.sides[1], "roles label the keys"), name, self.b, self.k0, self.k1)


def extremes(roles: Roles, name: str, b: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest label among the tokens first .. last."""
    span = int((last - first).max()) + 1
    low = high = roles.label(name, b, first)
    for i in range(1, span):
        label = roles.label(name, b, torch.minimum(first + i, last))
        low, high = torch.minimum(low, label), torch.maximum(high, label)
    return low, high


def by_block(rule: Callable[..., Tensor], block: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rule of tiles of a predicate that knows tokens by their block alone; `block` names the setting."""

    def tiles(at: Tiles, **settings: Any) -> tuple[Tensor, Tensor]:
        size = settings[block]
        one = (at.q0 // size == at.q1 // size) & (at.k0 // size == at.k1 // size)
        seen = rule(Corner(at.b, at.h, at.q0, at.k0), **settings)
        return seen | ~one, seen & one

    return tiles


@dataclass(frozen=True, eq=False)
class Corner:
    """The first pair of a tile, as a predicate without roles is asked."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
