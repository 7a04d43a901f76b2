"""Numbers and names as words: the same in the terminal, in Markdown and on the HTML page."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

NONE = "–"
# the share of full attention's quality below which a method no longer counts as keeping it
KEEPS = 0.95


def number(value: object) -> float | None:
    """The value as a finite float, or None: rows come from files, and a failed cell has holes.

    >>> number(2), number(None), number(float("nan")), number("2")
    (2.0, None, None, None)
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def percent(value: object) -> str:
    """A share as per cent, with a decimal where the whole number would hide it.

    >>> percent(0.934), percent(0.0123), percent(1), percent(0.9996), percent(None)
    ('93 %', '1.2 %', '100 %', '100 %', '–')
    """
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.1%}".replace("%", " %") if 0 < value < 0.0995 else f"{value:.0%}".replace("%", " %")


def over_text(value: object, base: object) -> str:
    """A value over another, as per cent.

    >>> over_text(1, 4), over_text(1, None)
    ('25 %', '–')
    """
    value, base = number(value), number(base)
    return percent(value / base if value is not None and base else None)


def times(value: object) -> str:
    """A ratio of times: `0.81×` is faster than what it is compared with."""
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def short(value: object) -> str:
    """Any value in a few characters; numbers get three significant digits."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | set):
        return ", ".join(short(v) for v in value)
    return str(value)


def budget_text(budget: object) -> str:
    """A budget as people say it: a fraction, a number of tokens, or bytes.

    >>> [budget_text(b) for b in (0.1, 128, "64MB", None)]
    ['10 %', '128 tok', '64 MB', '']
    """
    if budget is None:
        return ""
    if isinstance(budget, float):
        return f"{100 * budget:.3g} %"
    if isinstance(budget, int):
        return f"{budget} tok"
    text = str(budget)
    digits = text.rstrip("KMGTiBkb ")
    return f"{digits} {text[len(digits) :].strip()}" if digits.replace(".", "", 1).isdigit() else text


def budget_order(budget: object) -> tuple[int, float, str]:
    """A sort key over budgets of different kinds: none, fractions, tokens, bytes."""
    if isinstance(budget, str):
        value, _, unit = budget_text(budget).partition(" ")
        scale = 1024.0 ** (" KMGT".find(unit[:1].upper()) if unit[:1].upper() in "KMGT" else 0)
        return 3, number_or_zero(value) * scale, budget
    return (0 if budget is None else 1 if isinstance(budget, float) else 2), number(budget) or 0.0, ""


def number_or_zero(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def name(row: Mapping[str, Any]) -> str:
    """Method and budget: `streaming_llm @ 10 %`."""
    label, budget = str(row.get("label") or row.get("method")), budget_text(row.get("budget"))
    return f"{label} @ {budget}" if budget else label


def clean(text: object) -> str:
    """One line that is safe to print: no control characters, no escape sequences, no half characters."""
    text = " ".join(str(text).split()).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def listing(items: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    texts = [str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def shortened(names: list[str], most: int = 4) -> str:
    return listing(names if len(names) <= most else [*names[:most], f"{len(names) - most} more"])


def plural(n: int, noun: str) -> str:
    """`1 cell`, `3 cells`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def lengths_text(lengths: list[Any]) -> str:
    if len(lengths) > 5:
        return f"{len(lengths)} lengths from {lengths[0]} to {lengths[-1]}"
    return f"{'length' if len(lengths) == 1 else 'lengths'} {listing(lengths)}"


def described(row: Mapping[str, Any]) -> str:
    """What a method keeps and costs, in one clause."""
    low, high = row["quality_low"], row["quality_high"]
    interval = (
        f" (interval {percent(low)} to {percent(high)})" if low is not None and high is not None else ""
    )
    parts = [f"{percent(row['quality'])} of its quality{interval}"]
    parts += [f"{percent(row['held'])} of its bytes held"] if row["held"] is not None else []
    parts += [f"{percent(row['read'])} of its bytes read per token"] if row["read"] is not None else []
    parts += [f"{times(row['decode_ratio'])} its decode time"] if row["decode_ratio"] is not None else []
    return listing(parts)


def scope_text(run: Mapping[str, Any], tasks: list[Any], lengths: list[Any]) -> str:
    noun = "task" if len(tasks) == 1 else "tasks"
    model = clean(run.get("model") or "this model")
    return f"on {model} ({noun} {listing(map(clean, tasks))}; {lengths_text(lengths)})"
