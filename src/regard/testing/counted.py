"""Pages whose settings fix the number of tokens: the settings for another number, and which numbers there are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any


def for_tokens(case: Any, n: int, settings: Mapping[str, Any]) -> Any:
    """The case with these settings, and those of its page for n tokens, where settings fix their number."""
    case = replace(case, cfg=replace(case.cfg, **settings)) if settings else case
    change = case.page.for_tokens
    return case if change is None or n == 0 else replace(case, cfg=change(case.cfg, n))


def next_number(case: Any, n: int) -> int:
    """n, or the next number of tokens that the page can be asked."""
    while True:
        try:
            for_tokens(case, n, {})
        except ValueError:
            n += 1
        else:
            return n
