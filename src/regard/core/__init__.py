"""The nouns of the library: pages and cards, calls, patterns and masks, sites and edits, claims.

Types of tensors are imported when they are first used: what reads names and cards alone waits for no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regard.core.card import Card
from regard.core.claim import Claim, Measured
from regard.core.deprecation import moved
from regard.core.edit import Edit, Observer, Site
from regard.core.errors import NeverFired, Unreachable, Unsupported, near, require, show, unknown
from regard.core.pages import PATTERNS, Kind, Method, Page

if TYPE_CHECKING:
    from regard.core.shapes import (
        Alive,
        K,
        LogSum,
        MaskTensor,
        Out,
        Q,
        Scores,
        Slots,
        SlotScores,
        State,
        V,
    )

__all__ = [
    "Alive",
    "Card",
    "Claim",
    "Edit",
    "K",
    "Kind",
    "LogSum",
    "MaskTensor",
    "Measured",
    "Method",
    "NeverFired",
    "Observer",
    "Out",
    "PATTERNS",
    "Page",
    "Q",
    "Scores",
    "Site",
    "SlotScores",
    "Slots",
    "State",
    "Unreachable",
    "Unsupported",
    "V",
    "near",
    "require",
    "show",
    "unknown",
]

SHAPES = ("Alive", "K", "LogSum", "MaskTensor", "Out", "Q", "Scores", "Slots", "SlotScores", "State", "V")
HERE_BEFORE = ("block", "cache", "mask", "position", "task", "tracing")
_moved = moved(
    __name__,
    {f"{kind.capitalize()}Page": f"regard.kinds.{kind}:{kind.capitalize()}Page" for kind in HERE_BEFORE}
    | {"Mechanism": "regard.kinds.mechanism:Mechanism"},
)


def __getattr__(name: str) -> Any:
    return getattr(import_module("regard.core.shapes"), name) if name in SHAPES else _moved(name)
