"""Several questions about one context, and long continuations: quality by turn, likelihood by place."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.report.figures import Figure, axis, layout, plotted, spread
from regard.report.marks import Marks, glyph
from regard.report.pieces import breakable
from regard.report.result import Result, mean, ok
from regard.report.words import NONE, budget_order, budget_text, clean, number, percent

Row = dict[str, Any]
Group = dict[tuple[str, str], list[Row]]  # (method, budget) -> its rows
LEADS = {
    "by_turn": "One context, and one question after another: the share of right answers of each turn, the mean over "
    "lengths. A method that chose what to keep by the first question is good at the first turn only.",
    "nll_by_place": "How well a continuation is foretold, from its start on: negative log-likelihood in nats per "
    "token, the mean over lengths; lower is better.",
}
LONG = 64  # a part of a continuation begins there, or it has too few tokens to be told in parts
TITLES = {"by_turn": "Quality by turn", "nll_by_place": "Likelihood by place"}


def label_of(row: Mapping[str, Any]) -> str:
    return str(row.get("label") or row["method"])


def grouped(result: Result, key: str) -> dict[str, Group]:
    """Task -> (method, budget) -> the rows that have several values under `key`, full attention first."""
    found: dict[str, Group] = {}
    rows = [row for row in result.rows if ok(row) and told_apart(row, key)]
    for row in sorted(rows, key=lambda r: (r["method"] != "full", label_of(r), budget_order(r["budget"]))):
        at = label_of(row), budget_text(row["budget"])
        found.setdefault(str(row["task"]), {}).setdefault(at, []).append(row)
    return dict(sorted(found.items()))


def told_apart(row: Mapping[str, Any], key: str) -> bool:
    """Whether a row has several turns, or a continuation long enough for parts that say something."""
    values = row.get(key) or ()
    return len(values) > 1 and (key == "by_turn" or values[-1][0] >= LONG)


def by_turn(rows: Sequence[Row]) -> list[tuple[int, float | None]]:
    """(turn, mean over rows), as many turns as any of them has."""
    turns = max(len(row["by_turn"]) for row in rows)
    return [(i + 1, mean(row["by_turn"][i] for row in rows if i < len(row["by_turn"]))) for i in range(turns)]


def by_place(rows: Sequence[Row]) -> list[tuple[int, float | None]]:
    """(first token, mean over rows) of each part of the continuation."""
    places: dict[int, list[object]] = {}
    for row in rows:
        for at, value in row["nll_by_place"]:
            places.setdefault(int(at), []).append(value)
    return [(at, mean(values)) for at, values in sorted(places.items())]


POINTS = {"by_turn": by_turn, "nll_by_place": by_place}


def table_rows(result: Result, key: str) -> list[dict[str, str]]:
    """Task, method, budget and a column for each turn, or for each part of the continuation, as text."""
    rows = []
    for task, groups in grouped(result, key).items():
        for (label, budget), found in groups.items():
            values = {column(key, at): value_text(key, v) for at, v in POINTS[key](found)}
            rows.append({"task": clean(task), "method": clean(label), "budget": budget, **values})
    return rows


def column(key: str, at: int) -> str:
    return f"turn {at}" if key == "by_turn" else f"from {at}"


def value_text(key: str, value: float | None) -> str:
    if value is None:
        return NONE
    return percent(value) if key == "by_turn" else f"{value:.2f}"


def columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The heads of a table of these rows, those of numbers in their order."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return [*heads[:3], *sorted(heads[3:], key=lambda head: int(head.split()[1]))]


def figure(result: Result, key: str, task: str, marked: Marks, budgets: Sequence[str]) -> Figure:
    """A line for each method × budget over turns or places; the page shows one budget at a time."""
    scale = 100 if key == "by_turn" else 1
    lines = {
        at: [(x, scale * y) for x, y in POINTS[key](rows) if number(y) is not None and y is not None]
        for at, rows in grouped(result, key)[task].items()
    }
    places = sorted({x for points in lines.values() for x, _ in points})
    pad = 0.05 * (places[-1] - places[0])
    ticks = {"range": [places[0] - pad, places[-1] + pad], "tickvals": places}
    xaxis = axis("Turn" if key == "by_turn" else "First token of the part", **ticks)
    values = [y for points in lines.values() for _, y in points]
    yaxis = axis("Share of right answers", range=[-3, 103], ticksuffix=" %")
    if key != "by_turn":
        yaxis = axis("Nats per token", range=spread(values, 0.05, min(values), max(values)))
    traces = [line(key, at, points, marked, budgets) for at, points in lines.items()]
    return {"data": traces, "layout": layout(task, xaxis, yaxis, height=330)}


def line(
    key: str, at: tuple[str, str], points: list[tuple[int, float]], marked: Marks, budgets: Sequence[str]
) -> Figure:
    label, budget = at
    colour, shape = marked[label]
    full, who = shape == "star", f"{label} @ {budget}" if budget else label
    says = "{:.0f} %" if key == "by_turn" else "{:.3f} nats"
    marker = {"color": colour, "symbol": shape, "size": 11 if full else 8}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotted(who),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": colour, "width": 2.2 if full else 1.5, "dash": "dot" if full else "solid"},
        "marker": marker | {"line": {"width": 1, "color": "#ffffff"}},
        "hoverinfo": "text",
        "hovertext": [f"<b>{plotted(who)}</b><br>{column(key, x)}: {says.format(y)}" for x, y in points],
        "meta": {
            "method": list(marked).index(label),
            "budget": budgets.index(budget) if budget in budgets else None,
        },
        "cliponaxis": False,
    }


def figures(result: Result, key: str, marked: Marks, budgets: Sequence[str]) -> dict[str, Figure]:
    """The figures of a section by the ids of their places on the page."""
    name = "turns" if key == "by_turn" else "places"
    return {
        f"{name}-{i}": figure(result, key, task, marked, budgets)
        for i, task in enumerate(grouped(result, key))
    }


def html_table(rows: Sequence[Mapping[str, str]], marked: Marks) -> str:
    """The rows as a table of the page, each method with its mark; of one task alone without its name."""
    known = {clean(label): mark for label, mark in marked.items()}
    several, body = len({row["task"] for row in rows}) > 1, []
    heads = columns(rows)[0 if several else 1 :]
    first = "".join(
        f'<th scope="col" class="{"" if h in ("task", "method") else "n"}">{escape(h.capitalize())}</th>'
        for h in heads
    )
    for row in rows:
        who = f'<div class="who">{glyph(*known[row["method"]])}<span>{breakable(row["method"])}</span></div>'
        cells = [f"<td>{escape(row['task'])}</td>"] if several else []
        cells += [
            f"<td>{who}</td>",
            *(f'<td class="n">{escape(row.get(h, NONE))}</td>' for h in heads[1 + several :]),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f'<table class="parts"><thead><tr>{first}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide">{table}</div>'
