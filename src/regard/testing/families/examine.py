"""One family examined: what was tried on it, and the verdict."""

import time
from dataclasses import asdict, dataclass, field

from regard.testing.families.build import build
from regard.testing.families.trials import METHODS, Outcome, Subject, bare, policy, sites, tried

VERDICTS = ("right", "partly", "refused", "wrong", "crashed", "not built")


@dataclass
class FamilyRow:
    """What came of one family."""

    name: str
    model: str = ""
    verdict: str = ""
    why: str = ""
    reached: int = 0
    missed: tuple[str, ...] = ()
    recurrent: tuple[str, ...] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def drift(self) -> float | None:
        drifts = [o.drift for o in self.outcomes.values() if o.drift is not None]
        return max(drifts, default=None)

    def to_dict(self) -> dict:
        return {**asdict(self), "drift": self.drift}


def examine(name: str) -> FamilyRow:
    """Build the family's decoder and try regard on it."""
    start, row = time.perf_counter(), FamilyRow(name)
    try:
        model = build(name)
        row.model = type(model).__name__
        subject = Subject.of(model)
    except Exception as error:
        row.verdict, row.why = "not built", short(str(error)).split(". ")[0]
    else:
        try_all(row, subject)
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def try_all(row: FamilyRow, subject: Subject) -> None:
    def reached() -> Outcome:
        row.reached, row.missed, row.recurrent, refused = sites(subject.model)
        return Outcome("refused", refused) if refused else Outcome("right")

    row.outcomes["sites"] = tried(reached)
    row.outcomes["bare"] = tried(lambda: bare(subject))
    if row.outcomes["bare"].state == "right":
        for method in METHODS:
            row.outcomes[method.name] = tried(lambda m=method: policy(subject, m))
    row.verdict, row.why = judged(row)


def judged(row: FamilyRow) -> tuple[str, str]:
    """The verdict of what was tried, and the reasons for it."""
    for state in ("crashed", "wrong"):
        bad = [f"{column}: {o.said}" for column, o in row.outcomes.items() if o.state == state]
        if bad:
            return state, "; ".join(bad)
    if row.outcomes["bare"].state == "refused":
        return "refused", short(row.outcomes["bare"].said)
    policies = [row.outcomes[method.name] for method in METHODS]
    if not row.reached and all(o.state == "refused" for o in policies):
        return "refused", f"no attention is reached: {short(policies[0].said)}"
    less = reasons(row)
    if row.missed:
        less.append(f"not reached: {', '.join(row.missed)}")
    return ("partly", "; ".join(less)) if less else ("right", "")


def reasons(row: FamilyRow) -> list[str]:
    """What was not tried or is refused, each reason once, with the columns that it is of."""
    columns: dict[str, list[str]] = {}
    for column, outcome in row.outcomes.items():
        if outcome.state != "right":
            columns.setdefault(short(outcome.said).replace(f"{column} ", ""), []).append(column)
    return [f"{', '.join(names)}: {said}" for said, names in columns.items()]


def short(said: str) -> str:
    """The first part of a refusal, without what follows from it or is to be done."""
    return " ".join(said.split()).split("; ")[0].split(", so ")[0]
