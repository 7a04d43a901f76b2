"""The nouns of the library: pages and cards, calls, patterns and masks, sites and edits, claims."""

from typing import Any

from regard.core.card import Card
from regard.core.claim import Claim, Measured
from regard.core.deprecation import moved
from regard.core.edit import Edit, Observer, Site
from regard.core.errors import NeverFired, Unreachable, Unsupported, near, require, show, unknown
from regard.core.pages import Kind, Method, Page
from regard.core.shapes import (
    PATTERNS,
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

HERE_BEFORE = ("block", "cache", "mask", "position", "task", "tracing")
_moved = moved(
    __name__,
    {f"{kind.capitalize()}Page": f"regard.kinds.{kind}:{kind.capitalize()}Page" for kind in HERE_BEFORE}
    | {"Mechanism": "regard.kinds.mechanism:Mechanism"},
)


def __getattr__(name: str) -> Any:
    return _moved(name)
