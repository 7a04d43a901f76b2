"""The card of a page: what tables, documentation and `regard show` are printed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Card:
    """Data about a page. Tables, documentation and `regard show` are printed from it.

    `neutral` is a configuration under which the method changes nothing (full budget, window >= N, ...);
    the checks hold the page to it. `caveat` says where page and paper, or paper and released code, differ.
    """

    title: str
    paper: str
    year: int
    idea: str
    cost: str = ""
    state: str = ""
    needs: tuple[str, ...] = ()
    lineage: tuple[str, ...] = ()
    caveat: str = ""
    neutral: Mapping[str, Any] = field(default_factory=dict)
