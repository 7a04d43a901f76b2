"""`regard check FILE.py:function`: the laws of attention asked of a function, with the smallest counterexamples.

Laws that need no other function to compare with are always asked; `against` names a page of the catalogue whose
reference the outputs and gradients must equal. A law is asked at 1, 2, 3, ... tokens and then at its own length, so
the first that breaks is the shortest.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch

from regard import catalog
from regard.core import Unsupported, require, unknown
from regard.core.deprecation import moved
from regard.core.errors import present
from regard.core.shapes import PATTERNS
from regard.core.spec import parse_spec
from regard.kinds.mechanism import Mechanism
from regard.testing import laws
from regard.testing.case import B, Broken, Case, D, E, H, Inputs, NotApplicable, gradients, value_width
from regard.testing.function import LENGTHS, SMALL, Function, FunctionCase, load, probe

CHECKS = (
    laws.check_pure, laws.check_causality, laws.check_reach, laws.check_accumulates, laws.check_last_queries,
    laws.check_window, laws.check_prefix, laws.check_segments, laws.check_decode,
    laws.check_padding_right, laws.check_padding_left, laws.check_padded_state, laws.check_mask_obeyed,
    laws.check_blind_rows, laws.check_batch, laws.check_groups, laws.check_gradients, laws.check_extremes,
    laws.check_precision,
)  # fmt: skip
INEXACT = (laws.check_precision,)  # what holds at its own length may miss the bound at a length of one or two
# what a function may refuse by an error: only a wrong answer breaks the law
REFUSABLE = (laws.check_last_queries, laws.check_groups, laws.check_padded_state)
SHORT = (laws.check_precision, laws.check_gradients)  # not asked at LONG
LONG = 65


@dataclass(frozen=True)
class CheckReport:
    """What was asked and found: a row per law, {law, verdict, means, said, counterexample}."""

    target: str
    pattern: str
    against: str | None
    facts: Mapping[str, Any]
    rows: tuple[dict[str, Any], ...]

    @cached_property
    def violated(self) -> list[str]:
        return [row["law"] for row in self.rows if row["verdict"] == "violated"]

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"facts": dict(self.facts), "violated": self.violated, "rows": list(self.rows)}

    def table(self) -> Any:
        """The rows as a table for the terminal, what is violated in red."""
        from rich.text import Text

        from regard.report import table

        style = {"held": "green", "violated": "bold red", "not applicable": "dim"}
        shown = [row | {"verdict": Text(row["verdict"], style=style[row["verdict"]])} for row in self.rows]
        beside = f" against {self.against}" if self.against else ""
        return table(shown, ["law", "verdict", "said"], f"{self.target}, {self.pattern}{beside}")


def check_file(
    target: str, pattern: str = "causal_self", against: str | None = None, *, compiles: bool = False
) -> CheckReport:
    """Every law on the function of "FILE.py:function", beside the page of "NAME:key=value" where one is given.

    Raises ValueError, KeyError or OSError where the question cannot be asked: no such file, function or page, an
    argument that the check cannot give, a function that fails. `compiles` asks torch.compile too.
    """
    if pattern not in PATTERNS:
        raise unknown("pattern", pattern, PATTERNS)
    function = load(target)
    other = None if against is None else page_of(against, pattern)
    case, failed = probe(function, pattern, {} if other is None else shared(other, function))
    rows = [lengths(failed)]
    if other is not None:
        beside = Beside(**vars(case), other=other, name=against)
        rows += [search(check, beside, function) for check in (check_equals, check_equal_gradients)]
    checks = (*CHECKS, laws.check_compiles) if compiles else CHECKS
    rows += [search(check, case, function) for check in checks]
    facts = {
        "takes": list(function.takes.values()),
        "dtypes": [laws.plain(t) for t in case.dtypes],
        "tolerance": case.tol,
        "inputs": f"torch.randn, B={B}, H={H}, D={D}, E={case.width}, the generator seeded with n",
    }
    return CheckReport(target, pattern, against, facts, tuple(rows))


def row(
    law: str, means: str, verdict: str, message: str = "", counterexample: dict | None = None
) -> dict[str, Any]:
    return {
        "law": law,
        "verdict": verdict,
        "means": means,
        "said": message,
        "counterexample": written(counterexample),
    }


def written(value: Any) -> Any:
    """As JSON knows it: NaN and infinity as words."""
    if isinstance(value, dict):
        return {key: written(part) for key, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def lengths(failed: Mapping[int, str]) -> dict[str, Any]:
    """The law that it runs at every length."""
    means = "It runs at every length, 1 and ragged ones too."
    if not failed:
        return row("lengths", means, "held")
    n, error = next(iter(failed.items()))
    message = f"n={n}: {error}" + (
        f"; also n={', '.join(map(str, [*failed][1:]))}" if len(failed) > 1 else ""
    )
    return row("lengths", means, "violated", message, {"n": n, "raised": error, "all": list(failed)})


def search(check: Callable, case: FunctionCase, function: Function) -> dict[str, Any]:
    """The row of one law, with the counterexample of the shortest length that has one."""
    sizes: list[int | None] = [None]
    if (parameter := inspect.signature(check).parameters.get("n")) is not None:
        small = [n for n in SMALL if n < parameter.default and check not in INEXACT]
        wanted = sorted({*small, parameter.default, *([] if check in SHORT else [LONG])})
        sizes = [n for n in wanted if n in case.lengths] or list(case.lengths[:1])
    results = [("not applicable", "", None)]
    for n in sizes:
        results.append(ask(check, case, function, n))
        if results[-1][0] == "violated":
            break
    if results[-1][0] == "violated" and check in INEXACT:
        results.append(shorter(check, case, function, results[-1]))
    law = check.__name__.removeprefix("check_").replace("_", " ")
    ranked = {"violated": 0, "held": 1, "not applicable": 2}
    means = present(check.__doc__, "a law says what it means", law=law).splitlines()[0]
    return row(law, means, *min(reversed(results), key=lambda f: ranked[f[0]]))


def shorter(check: Callable, case: FunctionCase, function: Function, broken: tuple) -> tuple:
    """The same fault, in the same dtype, at the shortest length that shows it."""
    narrow = replace(case, dtypes=tuple(t for t in case.dtypes if laws.plain(t) == broken[2].get("dtype")))
    found = (ask(check, narrow, function, n) for n in SMALL if n in case.lengths and narrow.dtypes)
    return next((result for result in found if result[0] == "violated"), broken)


def ask(
    check: Callable, case: FunctionCase, function: Function, n: int | None
) -> tuple[str, str, dict | None]:
    """(verdict, what to say, counterexample) of a law at one length."""
    at = {} if n is None else {"n": n}
    prefix = "" if n is None else f"n={n}: "
    try:
        check(case, **at)
    except (NotApplicable, Unsupported) as reason:
        return "not applicable", str(reason), None
    except Broken as error:
        return "violated", f"{prefix}{error}", at | error.numbers
    except AssertionError as error:
        return "violated", f"{prefix}{error}", at
    except Exception as error:
        raised = function.locate(error)
        if check in REFUSABLE:
            return "not applicable", f"it refuses to be asked: {raised}", None
        if len(case.lengths) < len(LENGTHS):
            return "not applicable", f"it does not run at the lengths that this law asks: {raised}", None
        return "violated", f"{prefix}it raised {raised}", at | {"raised": raised}
    return "held", "", None


@dataclass(frozen=True)
class Beside(FunctionCase):
    """The function beside a page of the catalogue."""

    other: Case = field(kw_only=True)
    name: str = field(kw_only=True)

    def questions(self, n: int) -> Iterator[tuple[str, Inputs, torch.Tensor | None]]:
        """What both are asked: no mask, and the last keys of a row hidden, where both take it."""
        inputs = self.inputs(n, n + 3, width=min(self.width, value_width(self.other)))
        m = inputs.k.shape[2]
        inputs = replace(inputs, roles=self.other.labels(m))
        hidden = torch.ones(B, 1, 1, m, dtype=torch.bool)
        hidden[1, ..., m - m // 3 :] = False
        yield f"beside {self.name}", inputs, None
        try:
            self.able(inputs, hidden)
            self.other.able(inputs, hidden)
        except NotApplicable:
            return
        yield f"beside {self.name}, keys hidden", inputs, hidden

    def both(self) -> tuple[Callable, Callable]:
        """The function and the page's reference, without their states: each has its own form."""

        def alone(path: Callable) -> Callable:
            return lambda *args, **options: (path(*args, **options)[0], None)

        return alone(self.page.reference), alone(self.other.page.reference)


def check_equals(case: Beside, n: int = 65) -> None:
    """Outputs are those of the page it is compared with."""
    for label, inputs, mask in case.questions(n):
        ours, theirs = case.both()
        case.same(label, case.run(ours, inputs, mask)[0], case.other.run(theirs, inputs, mask)[0])


def check_equal_gradients(case: Beside, n: int = 65) -> None:
    """Gradients are those of the page it is compared with."""
    for label, inputs, mask in case.questions(n):
        ours, theirs = case.both()
        grads, wanted = gradients(case, ours, inputs, mask)[2], gradients(case.other, theirs, inputs, mask)[2]
        for name, gradient in wanted.items():
            case.same(f"{label}: the gradient of {name}", grads[name], gradient)


def page_of(against: str, pattern: str) -> Case:
    """The page of "NAME:key=value,..." as a case."""
    name, settings = parse_spec(against)
    page: Any = catalog.get(name)
    require(isinstance(page, Mechanism), "a function is compared with a mechanism", name=name, kind=page.kind)
    case = Case(page, page.configure(**settings), pattern)
    if pattern not in page.patterns:
        raise Unsupported(
            f"{name} does not do {pattern}: {page.unsupported.get(pattern, 'it gives no reason')}"
        )
    learned = list(case.params(H, H, E))
    require(
        not learned and not page.reads_x(case.cfg), "a page of q, k and v alone", name=name, learned=learned
    )
    return case


def shared(other: Case, function: Function) -> dict[str, Any]:
    """The page's window and scale, where the function takes them."""
    settings = {
        name: getattr(other.cfg, name, None) for name in ("window", "scale") if name in function.takes
    }
    return {name: value for name, value in settings.items() if value is not None}


__getattr__ = moved(__name__, {"Report": "regard.testing.check:CheckReport"})
