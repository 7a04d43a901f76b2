"""The nouns of the library: pages and cards, patterns and masks, sites and edits, budgets and cache views, claims."""

from regard.core.claim import Claim, Measured
from regard.core.edit import Edit, Observer, Site
from regard.core.errors import NeverFired, Unreachable, Unsupported, near, require, show, unknown
from regard.core.pages import (
    CachePage,
    Card,
    MaskPage,
    Mechanism,
    Method,
    Page,
    PositionPage,
    TaskPage,
    TracingPage,
)
from regard.core.shapes import PATTERNS, Alive, K, LogSum, MaskTensor, Out, Q, Scores, Slots, SlotScores, State, V

__all__ = [
    "Alive",
    "CachePage",
    "Card",
    "Claim",
    "Edit",
    "K",
    "LogSum",
    "MaskPage",
    "MaskTensor",
    "Measured",
    "Mechanism",
    "Method",
    "NeverFired",
    "Observer",
    "Out",
    "PATTERNS",
    "Page",
    "PositionPage",
    "Q",
    "Scores",
    "Site",
    "SlotScores",
    "Slots",
    "State",
    "TaskPage",
    "TracingPage",
    "Unreachable",
    "Unsupported",
    "V",
    "near",
    "require",
    "show",
    "unknown",
]
