"""Grids: tokens of an image or a clip, one for each place, row by row. Where they stand is said by roles.

A page of grids says in an `OnGrid` what it needs of one; whoever asks it (`attend`, `nn`, the checks) gives
`roles=Roles.grid(rows, columns)`, and the page reads the sides of the grid from its call.

>>> sides_of(Roles.grid(2, 3), 6, (2,))
(2, 3)
>>> sides_of(Roles.grid(2, 3), 7, (2,))
Traceback (most recent call last):
...
ValueError: must hold: a grid has a place for each token (grid=(2, 3), tokens=7)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.errors import Unsupported, require
from regard.core.roles import AXES, Roles

Sides = tuple[int, ...]
SAY = "tokens of a grid say where they stand: roles=Roles.grid(rows, columns)"


@dataclass(frozen=True)
class OnGrid:
    """What a page needs of the grid that its tokens fill.

    fits      fits(cfg, sides) raises ValueError, with the rule and the values, where the settings do not go with a grid
    axes      how many axes the grid may have: 1 is x, 2 are y and x, 3 are frame, y and x
    local     local(cfg) -> (reach, step) of a page whose outputs depend on near places only: no further away than
              `reach` on any axis, and a grid that is cut at multiples of `step` gives the same inside; None: on all
    permutes  permutes(cfg) -> whether tokens that change places change the places of the outputs and nothing else
    """

    fits: Callable[[Any, Sides], None]
    axes: tuple[int, ...] = (2,)
    local: Callable[[Any], tuple[int, int] | None] = lambda cfg: None
    permutes: Callable[[Any], bool] = lambda cfg: False


def sides_of(roles: Any, tokens: int, axes: tuple[int, ...]) -> Sides:
    """The sides of the grid that these tokens fill; ValueError where they fill none, or one of other axes."""
    require(isinstance(roles, Roles), SAY, roles=roles)
    sides = roles.sides
    require(sides is not None, SAY, roles=roles)
    require(math.prod(sides) == tokens, "a grid has a place for each token", grid=sides, tokens=tokens)
    wanted = " or ".join(", ".join(AXES[-n:]) for n in axes)
    require(len(sides) in axes, f"the axes of its grids are {wanted}", grid=sides)
    return sides


def grid_of(on: OnGrid | None, cfg: Any, roles: Any, tokens: int, masked: bool) -> Sides | None:
    """The grid of a call: None for a page that reads none. Refused beside a mask: a grid has all of its tokens."""
    if on is None:
        return None
    if masked:
        raise Unsupported("a mask beside a grid: an image has all of its tokens")
    sides = sides_of(roles, tokens, on.axes)
    if tokens:
        on.fits(cfg, sides)
    return sides
