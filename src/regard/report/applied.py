"""How what a comparison recommends is put on a model: the lines of Python, with every setting and the budget."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regard.report.prefill import only_prompts, soonest
from regard.report.questions import questions
from regard.report.result import Result
from regard.report.words import clean, name

Row = Mapping[str, Any]
CHEAPEST = "Cheapest at 95 %"
GENERATE = "    out = model.generate(**inputs, max_new_tokens=100)"
WIDTH = 100


@dataclass(frozen=True)
class Advice:
    """Methods for whom this is `why`, as the page says it: `name`, and `lines` that put it on `model`."""

    why: str
    name: str
    lines: tuple[str, ...]


def advice(result: Result, width: int = WIDTH) -> list[Advice]:
    """The winner and what the questions name, each method and budget once; those whose settings are known."""
    found: dict[str, tuple[list[str], Row]] = {}
    for why, row in named(result):
        found.setdefault(name(row), ([], row))[0].append(why)
    made = [(", ".join(whys), who, lines(result, row, width)) for who, (whys, row) in found.items()]
    return [Advice(first_capital(why), clean(who), tuple(code)) for why, who, code in made if code]


def named(result: Result) -> list[tuple[str, Row]]:
    """(what for, row of the summary) of all that the page recommends."""
    best, first = result.winner(), soonest(result)
    if only_prompts(result):
        return [] if first is None else [("soonest at the first token", first | {"budget": None})]
    rows = {f"{clean(name(row))}:": row for row in result.summary()}
    asked = [(CHEAPEST, best)] if best is not None else []
    for question, answer in questions(result):
        # the longest, since one name may begin as another does
        begins = max((start for start in rows if answer.startswith(start)), key=len, default="")
        asked += [(question, rows[begins])] if begins else []
    return [(why[0].lower() + why[1:], row) for why, row in asked]


def first_capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def settings_of(result: Result, label: str) -> Mapping[str, Any] | None:
    """What `attach` takes for a label: method, settings, pages; None where an older run does not say it."""
    known = (result.run.get("attached") or {}).get(label)
    if known is not None:
        return known
    plain = re.fullmatch(r"[a-z]\w*(\+[a-z]\w*)*", label)
    return {"method": label, "settings": {}, "pages": []} if plain and label != "full" else None


def lines(result: Result, row: Row, width: int = WIDTH) -> list[str]:
    """The lines of Python for a method at its budget, no wider where they can be broken; none where unknown.

    >>> run = {"attached": {"a(n=8)": {"method": "a", "settings": {"n": "8"}, "pages": []}}}
    >>> for line in lines(Result(run, []), {"label": "a(n=8)", "budget": "64MB"}):
    ...     print(line)
    import regard
    <BLANKLINE>
    with regard.attach(model, "a", n=8, budget="64MB"):
        out = model.generate(**inputs, max_new_tokens=100)
    """
    known = settings_of(result, str(row["label"]))
    if known is None:
        return []
    settings, page = dict(known["settings"]), text(known["method"])
    budget = [] if row["budget"] is None else [f"budget={text(row['budget'])}"]
    target, learned = settings.pop("target", None), settings.get("learned")
    own = [f"regard.register({text(path)})" for path in known.get("pages") or ()]
    words = ["tokenizer=tokenizer"] if known.get("words") else []
    head, attached = ["import regard"], [page, *keywords(settings), *budget, *words]
    if learned is not None:
        head.append("from regard.attaching.converted import configured")
        pairs = ", ".join(f"{text(key)}: {value}" for key, value in settings.items())
        own += broken("method = configured", [page, f"{{{pairs}}}", "model.device"], "", width)
        attached = ["method"]
    if target is not None:
        if learned is None:
            own += broken("method = regard.method", [page, *keywords(settings)], "", width)
        how = ["model", "tokenizer", "method", target, f"length={max(result.lengths())}", "samples=2"]
        own += broken("method = regard.calibrate", how, "", width)
        attached = ["method"]
    return [*head, "", *own, *broken("with regard.attach", ["model", *attached], ":", width), GENERATE]


def text(value: Any) -> str:
    """A value as Python reads it, texts between double quotes where they hold none.

    >>> [text(v) for v in (8, "64MB", (1, 2), float("inf"))]
    ['8', '"64MB"', '(1, 2)', 'float("inf")']
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    plain = isinstance(value, str) and repr(value)[0] == "'" and '"' not in value
    return f'"{repr(value)[1:-1]}"' if plain else repr(value)


def keywords(settings: Mapping[str, str]) -> list[str]:
    """Settings as arguments; those of a part, such as "adakv.floor", are no names and come as a dictionary."""
    plain = [f"{key}={value}" for key, value in settings.items() if key.isidentifier()]
    parts = ", ".join(f"{text(key)}: {value}" for key, value in settings.items() if not key.isidentifier())
    return [*plain, f"**{{{parts}}}"] if parts else plain


def broken(start: str, arguments: list[str], end: str, width: int) -> list[str]:
    """A call on one line, or with its arguments on a line of their own, or each on one.

    >>> broken("f", ["first", "second"], ":", 12)
    ['f(', '    first,', '    second,', '):']
    """
    whole, inside = f"{start}({', '.join(arguments)}){end}", f"    {', '.join(arguments)}"
    if len(whole) <= width:
        return [whole]
    if len(inside) <= width and not inside.lstrip().startswith("**"):
        return [f"{start}(", inside, f"){end}"]
    return [f"{start}(", *(f"    {argument}," for argument in arguments), f"){end}"]
