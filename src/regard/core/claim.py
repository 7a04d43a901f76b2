"""A claim: one statement of one paper, a measurement that can fail, its bound, the number that was measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from regard.core.errors import require

TIME = "time"
TOY = "toy"  # a model that a claim trains itself, among those that it names


Numbers = Mapping[str, float | int | str | list]


@dataclass(frozen=True)
class Measured:
    """What a measurement found. `holds` is the bound applied to `numbers`; nothing else decides it.

    `parts`: the bound line by line, name -> whether that line holds, where there are several; all of them must.
    The names of lines that a clock decides begin with TIME.
    """

    holds: bool
    numbers: Numbers = field(default_factory=dict)
    parts: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = "a bound holds where all of its parts do"
        require(
            not self.parts or self.holds == all(self.parts.values()), rule, holds=self.holds, parts=self.parts
        )

    @classmethod
    def by(cls, parts: Mapping[str, bool], numbers: Numbers) -> "Measured":
        """Of a bound that is the sum of its parts."""
        return cls(all(parts.values()), numbers, {name: bool(holds) for name, holds in parts.items()})

    @property
    def failing(self) -> set[str]:
        return {name for name, holds in self.parts.items() if not holds}


@dataclass(frozen=True)
class Claim:
    """`statement` is the paper's, at laptop scale; `bound` stands in words and was fixed before measuring.

    `models` are those of ours (`regard.load_shipped`) on which it is measured, the smallest first: `measure` is called
    with the name of each, and of those that were measured the last one decides. Empty: `measure` is called without.
    TOY among them is one that the claim trains itself.

    `contradicted`, where an honest experiment here goes against the paper, says what was tried and found, and
    `fails` which parts of the bound do not hold. The verdict of a measurement outside the bound then reads
    `contradicted` instead of `fails`, as long as all other parts hold: a broken measurement does not read the same.
    With `models` both are mappings from a model, to the text and to the parts.
    """

    name: str
    statement: str
    bound: str
    measure: Callable[..., Measured]
    contradicted: str | Mapping[str, str] = ""
    models: tuple[str, ...] = ()
    fails: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require(len({*self.models}) == len(self.models), "models, each once", models=self.models)
        if isinstance(self.contradicted, str):
            rule = "a claim with models says on which of them it is contradicted: {model: text}"
            require(not self.contradicted or not self.models, rule, name=self.name, models=self.models)
        else:
            rule = "contradicted on models of the claim"
            require({*self.contradicted} <= {*self.models}, rule, models=self.models, of=[*self.contradicted])
        for model in self.models or (None,):
            rule = "a claim that is contradicted says which parts of its bound fail, and no other does"
            said = bool(self.note(model)) == bool(self.parts_that_fail(model))
            require(said, rule, name=self.name, model=model, fails=self.fails)

    def note(self, model: str | None = None) -> str:
        """What was tried and found where the paper is contradicted, on this model."""
        return self.contradicted if isinstance(self.contradicted, str) else self.contradicted.get(model, "")

    def parts_that_fail(self, model: str | None = None) -> tuple[str, ...]:
        """Parts of the bound that do not hold where the paper is contradicted, on this model."""
        return self.fails.get(model, ()) if isinstance(self.fails, Mapping) else self.fails

    def verdict(self, measured: Measured, model: str | None = None) -> str:
        """holds, contradicted or fails; ValueError where parts are named that were not measured."""
        known = {*self.parts_that_fail(model)}
        missing = known - {*measured.parts}
        require(
            not missing,
            "parts that fail are among those that were measured",
            claim=self.name,
            missing=missing,
        )
        if measured.holds:
            return "holds"
        return "contradicted" if known and measured.failing <= known else "fails"
