"""A claim: one statement of one paper, a measurement that can fail, its bound, the number that was measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from regard.core.errors import require

TOY = "toy"  # a model that a claim trains itself, among those that it names


@dataclass(frozen=True)
class Measured:
    """What a measurement found. `holds` is the bound applied to `numbers`; nothing else decides it."""

    holds: bool
    numbers: Mapping[str, float | int | str | list] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """`statement` is the paper's, at laptop scale; `bound` stands in words and was fixed before measuring.

    `models` are those of ours (`regard.load_shipped`) on which it is measured, the smallest first: `measure` is called
    with the name of each, and of those that were measured the last one decides. Empty: `measure` is called without.
    TOY among them is one that the claim trains itself.

    `contradicted`, where an honest experiment here goes against the paper, says what was tried and found: the
    verdict of a measurement outside the bound then reads `contradicted` instead of `fails`. With `models` it is
    a mapping, model -> text.
    """

    name: str
    statement: str
    bound: str
    measure: Callable[..., Measured]
    contradicted: str | Mapping[str, str] = ""
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(len({*self.models}) == len(self.models), "models, each once", models=self.models)
        if isinstance(self.contradicted, str):
            rule = "a claim with models says on which of them it is contradicted: {model: text}"
            require(not self.contradicted or not self.models, rule, name=self.name, models=self.models)
        else:
            rule = "contradicted on models of the claim"
            require({*self.contradicted} <= {*self.models}, rule, models=self.models, of=[*self.contradicted])

    def note(self, model: str | None = None) -> str:
        """What was tried and found where the paper is contradicted, on this model."""
        return self.contradicted if isinstance(self.contradicted, str) else self.contradicted.get(model, "")

    def verdict(self, measured: Measured, model: str | None = None) -> str:
        if measured.holds:
            return "holds"
        return "contradicted" if self.note(model) else "fails"
