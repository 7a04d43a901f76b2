"""What moves what: perturb one token and see which outputs move."""

from collections.abc import Callable
from dataclasses import fields, replace

from regard.testing.case import Case, Inputs, NotApplicable, hold, moves


def check_influence(case: Case, n: int = 9) -> None:
    """Perturb one token and see which outputs move: causality, and what cross means."""
    for m in (n, n + 3) if "cross" in case.pattern else (n,):
        for label, path in case.paths.items():
            influence(case, label, path, case.inputs(n, m))


def influence(case: Case, label: str, path: Callable, inputs: Inputs) -> None:
    if case.pattern.startswith("causal"):
        causality(case, label, path, inputs)
    reach(case, label, path, inputs)


def causality(case: Case, label: str, path: Callable, inputs: Inputs) -> None:
    names, what = ("qx", "query") if "cross" in case.pattern else ("qkvx", "token")
    earlier(case, label, path, inputs, names, what, case.together)
    if case.together > 1 and "cross" not in case.pattern:
        # together they choose what is read; nobody reads the value of a later token
        earlier(case, label, path, inputs, "v", "value", 1)


def earlier(
    case: Case, label: str, path: Callable, inputs: Inputs, names: str, what: str, block: int
) -> None:
    for j, shifts in enumerate(moves(case, path, inputs, names, range(inputs.q.shape[2]))):
        early = min(shifts, default=j)
        by = shifts.get(early, 0.0)
        message = f"{label} looks ahead: {what} {j} moves the output of query {early} before it by {by:.3g}"
        hold(early // block >= j // block, message, token=j, moved=shifts)


def reach(case: Case, label: str, path: Callable, inputs: Inputs) -> None:
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    reached = moves(case, path, inputs, "kvy", range(m))
    for j, shifts in enumerate(reached):
        hold(shifts, f"{label}: key {j} of {m} moves no output", token=j, moved={})
    ahead = n == 1 == m or any(i < j for j, shifts in enumerate(reached) for i in shifts)
    message = (
        f"{label}: in {case.pattern} no key moves the output of an earlier query, as if keys were causal"
    )
    hold(ahead or case.pattern == "causal_self", message, token=m - 1, moved=reached[-1])


def check_causality(case: Case, n: int = 9) -> None:
    """No token moves the output of a query before it."""
    if not case.pattern.startswith("causal"):
        raise NotApplicable(f"{case.pattern} is not causal")
    for label, path in case.paths.items():
        causality(case, label, path, case.inputs(n, n + 2))


def check_reach(case: Case, n: int = 9) -> None:
    """Every key moves some output; where the pattern is not causal, outputs of earlier queries too."""
    for label, path in case.paths.items():
        reach(case, label, path, case.inputs(n, n + 2))


def check_accumulates(case: Case, n: int = 9) -> None:
    """The value of every token moves the output of some later query: what was read is kept."""
    if case.pattern != "causal_self":
        raise NotApplicable("it is a law of causal_self")
    inputs = case.inputs(n)
    for label, path in case.paths.items():
        for j, shifts in enumerate(moves(case, path, inputs, "v", range(n - 1))):
            message = f"{label} forgets: the value of token {j} moves no later output, only {list(shifts)}"
            hold(any(i > j for i in shifts), message, token=j, moved=shifts)


def check_queries(case: Case, n: int = 6) -> None:
    """A query that changes moves its own output, and in cross no other."""
    inputs = case.inputs(n, n + 3)
    for label, path in case.paths.items():
        for j, shifts in enumerate(moves(case, path, inputs, "q", range(n))):
            later = [i for i in shifts if i // case.together != j // case.together]
            alone = j == 0 and case.pattern == "causal_self"  # one key: whatever is asked, it is the answer
            hold(
                alone or j in shifts,
                f"{label}: query {j} does not move its own output",
                token=j,
                moved=shifts,
            )
            hold(
                not later,
                f"{label}: query {j} moves the output of query {(later or [0])[0]}",
                token=j,
                moved=shifts,
            )


def check_last_queries(case: Case, n: int = 7) -> None:
    """Fewer queries than keys in causal_self are the last ones: their rows are those of the whole."""
    if case.pattern != "causal_self":
        raise NotApplicable("it is a law of causal_self")
    if "queries" in case.page.exempt:
        raise NotApplicable(f"earlier queries are read: {case.page.exempt['queries']}")
    case.choosing()
    block = case.together
    n = n if block == 1 else max(n, block + 3)
    # those that choose together are asked together
    inputs, last = case.inputs(n), n - (n - min(3, n - 1)) // block * block
    if last == 0:
        raise NotApplicable("of one key there are no fewer queries")
    few = replace(inputs, q=inputs.q[:, :, n - last :])
    case.able(few)
    for label, path in case.paths.items():
        law = f"{label}: the last {last} queries on {n} keys = the last rows of all {n}"
        case.same(law, case.run(path, few)[0], case.run(path, inputs)[0][:, :, n - last :])


def check_window(case: Case, n: int = 20) -> None:
    """`window=w` shows w keys, the token itself included."""
    if case.pattern != "causal_self" or "window" not in {f.name for f in fields(case.cfg)}:
        raise NotApplicable("no causal window")
    inputs, checked = case.inputs(n), 0
    for w in (w for w in (1, 2, 3, 8) if w < n):
        try:
            narrow = replace(case, cfg=replace(case.cfg, window=w))
            narrow.able(inputs)
        except ValueError:
            continue
        checked += 1
        for label, path in case.paths.items():
            seen = [
                j for j, shifts in enumerate(moves(narrow, path, inputs, "v", range(n))) if n - 1 in shifts
            ]
            wanted = list(range(n - w, n))
            message = f"{label}: with window={w} query {n - 1} reads keys {seen}, not {wanted}"
            hold(seen == wanted, message, window=w, token=n - 1, found=seen, wanted=wanted)
    if not checked:
        raise NotApplicable(f"it takes no window narrower than {n} tokens")


def check_prefix(case: Case, n: int = 8) -> None:
    """Row i of the causal form is the last row of the form that is not causal, on the tokens up to i."""
    if case.pattern != "causal_self":
        raise NotApplicable("it is a law of causal_self")
    if "self" not in case.page.patterns:
        raise NotApplicable("the page has no form that is not causal")
    if case.together > 1:
        raise NotApplicable("queries choose their keys together, and a prefix leaves some of them out")
    whole = replace(case, pattern="self")
    inputs = case.inputs(n)
    for label, path in case.paths.items():
        out = case.run(path, inputs)[0]
        for i in range(n):
            last = whole.run(path, inputs.span(slice(0, i + 1)))[0][:, :, -1]
            case.same(f"{label}: causal row {i} = the last row of self on {i + 1} tokens", out[:, :, i], last)
