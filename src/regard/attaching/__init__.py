"""Attaching to Hugging Face models: masks, mechanisms, cache policies, edits and observers, and ledger caches."""

from regard.attaching import calibrate
from regard.attaching.attachment import attach

__all__ = ["attach", "calibrate"]
