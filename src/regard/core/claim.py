"""A claim: one statement of one paper, a measurement that can fail, its bound, the number that was measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """What a measurement found. `holds` is the bound applied to `numbers`; nothing else decides it."""

    holds: bool
    numbers: Mapping[str, float | int | str | list] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """`statement` is the paper's, at laptop scale; `bound` stands in words and was fixed before measuring.

    `contradicted`, where an honest experiment here goes against the paper, says what was tried and found: the
    verdict of a measurement outside the bound then reads `contradicted` instead of `fails`.
    """

    name: str
    statement: str
    bound: str
    measure: Callable[[], Measured]
    contradicted: str = ""

    def verdict(self, measured: Measured) -> str:
        if measured.holds:
            return "holds"
        return "contradicted" if self.contradicted else "fails"
