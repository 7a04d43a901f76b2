"""Positions: where a token is said to stand, for rotary tables and masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core import Kind, Page


@dataclass(frozen=True, eq=False)
class PositionPage(Page):
    """Where a token is said to stand.

    positions(roles, cfg) -> integers of the roles' shape, [N] or [B, N]
    build(cfg) -> the Mask that belongs to them, if any
    looks_ahead   whether this mask lets tokens see later ones, as for a mask page
    """

    positions: Callable = None  # type: ignore[assignment]
    build: Callable | None = None
    looks_ahead: bool | Callable[[Any], bool] = False
    kind = "position"


KIND = Kind(
    name="position",
    page=PositionPage,
    says="where a token is said to stand",
    verb="regard.nn.Attention(dim, heads, positions=NAME)(x, roles=roles)",
    room="methods/positions",
    checks="regard.testing.position:check_position_page",
)
