"""Checks that every attention mechanism must pass; yours too: `check_mechanism(METHOD)`.

A mechanism has one meaning and several ways to be run: reference and fast, whole and in segments, padded and not,
alone and in a batch, in several precisions. The laws (testing/laws.py) say that these agree, and that tokens influence
what the pattern lets them. A law that a mechanism cannot be asked (no state, a mask that it refuses) is "not
applicable", with the reason; one that it breaks raises AssertionError with the law and a small counterexample.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from regard import catalog
from regard.core import Unsupported
from regard.core.shapes import PATTERNS
from regard.kinds.mechanism import Mechanism
from regard.testing import case, laws
from regard.testing.case import EXACT, Case, Inputs, NotApplicable
from regard.testing.laws import CHECKS, GRID_CHECKS, check_compiles, check_neutral, check_widths

DESIGNED = "leaks by design"
ONCE = (check_compiles, check_neutral, check_widths)  # on the default configuration only


def __getattr__(name: str) -> Any:
    """The laws and what they are made of are known by this module's name too."""
    for room in (case, laws):
        if hasattr(room, name):
            return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_mechanism_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    return check_mechanism(catalog.get(name))


def law_of(check: Callable) -> str:
    return check.__name__.removeprefix("check_")


def check_mechanism(
    page: Mechanism, patterns: Iterable[str] | None = None, *, settings: Iterable[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Every law on every pattern of the page, on its default settings, those it tries, and those given.

    Returns "held" or "not applicable: reason" for each "law, pattern". Raises AssertionError with the page, the
    pattern, the settings, the law and a small counterexample.
    """
    report = examine(page, patterns, settings=settings)
    hold_all(page, report)
    return report


def hold_all(page: Mechanism, report: Mapping[str, str]) -> None:
    """AssertionError with the broken rows of a report, if there are any."""
    broken = [f"{key}: {verdict}" for key, verdict in report.items() if verdict.startswith("broken")]
    if broken:
        raise AssertionError(f"{page.card.title}\n  " + "\n  ".join(broken))


def examine(
    page: Mechanism, patterns: Iterable[str] | None = None, *, settings: Iterable[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """As check_mechanism, but a law that is broken is a row of the report: "broken: (settings) counterexample"."""
    report = {"card": verdict(check_card, page)}
    for pattern in page.patterns if patterns is None else patterns:
        for cfg in dict.fromkeys(
            page.configure(**options) for options in ({}, *page.test_settings, *settings)
        ):
            for check in (*CHECKS, *(GRID_CHECKS if page.grid else ())):
                key = f"{law_of(check)}, {pattern}"
                known = report.get(key, "")
                if known.startswith("broken") or (check in ONCE and cfg != page.config()):
                    continue
                result = verdict(check, Case(page, cfg, pattern))
                if known != "held" or result.startswith("broken"):
                    report[key] = result
    return report


def verdict(check: Callable, subject: Any) -> str:
    if isinstance(subject, Case) and law_of(check) in subject.page.exempt:
        return f"not applicable: {subject.page.exempt[law_of(check)]}"
    where = f"({subject.cfg}) " if isinstance(subject, Case) else ""
    try:
        check(subject)
    except NotApplicable as reason:
        return f"not applicable: {reason}"
    except AssertionError as error:
        return f"broken: {where}{error}"
    except Exception as error:
        return f"broken: {where}it raised {type(error).__name__}: {error}"
    return "held"


def check_card(page: Mechanism) -> None:
    """The card is filled in, patterns are known, and what is not supported is refused when it is asked for."""
    title = page.card.title
    for name in ("title", "paper", "idea", "cost", "state"):
        assert getattr(page.card, name), f"{title}: the card's {name} is empty"
    assert page.card.neutral or "neutral" in page.exempt, (
        f"{title}: the card states neutral settings, or why none"
    )
    unknown = set(page.exempt) - {law_of(check) for check in (*CHECKS, *GRID_CHECKS)}
    assert not unknown, f"{title}: exempt from laws that do not exist: {sorted(unknown)}"
    answers = supported(page)
    for pattern in PATTERNS:
        declared, works = pattern in page.patterns, answers[pattern].startswith(("yes", DESIGNED))
        assert declared == works, (
            f"{title}: {pattern} is declared {declared}, and asked for it says {answers[pattern]!r}"
        )


def supported(page: Mechanism) -> dict[str, str]:
    """For each pattern "yes", "no: " and what the page says, or "leaks: " and where; found by calling and truncating.

    A causal form is asked the text cut after query i: what query i sees may not change by it. Cross forms are asked
    fewer queries than keys, and more. "leaks by design: reason" is that of a page exempt from the law of influence;
    "fails: error" what is neither an answer nor a refusal.
    """
    answers = {}
    for pattern in PATTERNS:
        try:
            answers[pattern] = cell(page, pattern)
        except (Unsupported, NotImplementedError) as refusal:
            answers[pattern] = f"no: {page.unsupported.get(pattern, refusal)}"
        except Exception as error:
            answers[pattern] = f"fails: {type(error).__name__}: {error}"
    return answers


def cell(page: Mechanism, pattern: str) -> str:
    default = Case(page, page.config(), pattern)
    for path in default.paths.values():
        for n, m in ((5, 7), (7, 5)) if "cross" in pattern else ((5, 5),):
            default.run(path, default.inputs(n, m))
    if pattern.startswith("causal"):
        for cfg in dict.fromkeys(page.configure(**options) for options in ({}, *page.test_settings)):
            for n in (9, 66):
                if leaked := leak(Case(page, cfg, pattern), n):
                    designed = page.exempt.get("influence")
                    return f"{DESIGNED}: {designed}" if designed else f"leaks: {leaked}"
    return "yes"


def leak(case: Case, n: int) -> str:
    """Where a query's output changes when the queries after it are cut off (in causal_self their keys too), or ""."""
    inputs = case.inputs(n, n + 3)
    for label, path in case.paths.items():
        whole = case.run(path, inputs)[0]
        block = case.together
        ends = range(n - 1) if n < 16 else (0, n // 2 - 2, n - 3, n - 2)
        # queries that choose together are cut off together
        for i in sorted({min(i // block * block + block - 1, n - 1) for i in ends}):
            short = truncated(inputs, i + 1, case.pattern)
            by = (case.run(path, short)[0][:, :, i] - whole[:, :, i]).abs().max().item()
            if not by <= EXACT * max(1.0, whole.abs().max().item()):
                return f"{label}, {n} tokens cut after {i + 1}: query {i} changes by {by:.2g} ({case.cfg})"
    return ""


def truncated(inputs: Inputs, n: int, pattern: str) -> Inputs:
    """The first n queries, and in self the first n keys."""
    if pattern == "causal_self":
        return inputs.span(slice(0, n))
    x = None if inputs.x is None else inputs.x[:, :n]
    return replace(inputs, q=inputs.q[:, :, :n], x=x)


def support() -> dict[str, dict[str, str]]:
    """Mechanism x pattern -> "yes", "no: reason" or "leaks: where", for every mechanism of the catalogue."""
    return {name: supported(page) for name, page in catalog.every() if isinstance(page, Mechanism)}


def support_matrix() -> list[dict[str, str]]:
    """The same as rows of a table: mechanism and the four patterns."""
    return [{"mechanism": name, **cells} for name, cells in support().items()]
