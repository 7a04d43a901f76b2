"""The questions that an engineer asks of a comparison, each with its answer, its interval and what is to be doubted."""

from collections.abc import Callable, Sequence
from typing import Any

from regard.report.result import Result, ok
from regard.report.sentence import cost
from regard.report.turns import told_apart
from regard.report.words import KEEPS, clean, described, name, percent, plural, times

HALF = 0.5
NEAR = 0.005  # rounded bytes: a budget of one half may hold a little more

Row = dict[str, Any]


def questions(result: Result) -> list[tuple[str, str]]:
    """(question, answer) of what can be asked of these rows; none where no method has every cell."""
    rows = [r for r in result.summary() if r["method"] != "full" and r["complete"]]
    if not rows:
        return []
    asked = [half_the_bytes(rows), fastest(rows)]
    return [pair for pair in (*asked, many_turns(result)) if pair is not None]


def half_the_bytes(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The best among those that hold at most half of full attention's bytes."""
    small = [r for r in rows if r["held"] is not None and r["held"] <= HALF + NEAR]
    if not small:
        return None
    best = max(small, key=lambda r: (r["quality"], -r["held"]))
    return "Best at half the bytes", f"{clean(name(best))}: {described(best)}.{tied(best, small)}"


def fastest(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The shortest decode among those that keep 95 %."""
    kept = [r for r in rows if r["quality"] >= KEEPS - 1e-9 and r["decode_ratio"] is not None]
    if not kept:
        return None
    best = min(kept, key=cost("decode_ratio", "held", "read"))
    text = f"{clean(name(best))}: {described(best)}."
    spread = best["decode_spread"]
    if best["decode_ratio"] >= 1:
        text += " Nothing that keeps 95 % decodes sooner than full attention here."
    elif spread is not None and best["decode_ratio"] + spread >= 1:
        text += f" With a spread of ±{spread:.2f} it may not be sooner than full attention."
    others = [r for r in kept if r is not best and r["decode_ratio"] <= best["decode_ratio"] + (spread or 0)]
    if others:
        slowest = times(max(o["decode_ratio"] for o in others))
        text += f" {plural(len(others), 'other')} within its spread, at most {slowest}."
    return "Fastest decode at 95 %", text


def many_turns(result: Result) -> tuple[str, str] | None:
    """The best on the tasks in which one context is asked several times."""
    turns = {str(r["task"]) for r in result.rows if ok(r) and told_apart(r, "by_turn")}
    part = Result(result.run, [r for r in result.rows if str(r["task"]) in turns])
    rows = [r for r in part.summary() if r["method"] != "full" and r["complete"]]
    if not turns or not rows:
        return None
    best = max(rows, key=lambda r: (r["quality"], -(r["held"] or 1)))
    text = f"{clean(name(best))}: {described(best)} on {clean(', '.join(sorted(turns)))}.{tied(best, rows)}"
    return "Best over many turns", text


def tied(best: Row, rows: Sequence[Row]) -> str:
    """How many others cannot be told from the best, and the cheapest of them."""
    low = best["quality_low"]
    if low is None:
        return " Without an interval, since too few samples were asked."
    others = [r for r in rows if r is not best and r["quality_high"] is not None and r["quality_high"] >= low]
    if not others:
        return " No other reaches its interval."
    least: Callable[[Row], Any] = cost("held", "read", "decode_ratio")
    cheap = min(others, key=least)
    more = f"The intervals of {plural(len(others), 'other')} reach into its own"
    if least(cheap) < least(best):
        return f" {more}; the cheapest of them is {clean(name(cheap))}, {percent(cheap['held'])} held."
    return f" {more}, none of them cheaper."
