"""The table of all methods: a row for each method and budget, the columns that this run has something for."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from regard.report.cards import anchors, linked
from regard.report.figures import COSTS
from regard.report.marks import Marks, glyph
from regard.report.pieces import breakable, cell, section, share
from regard.report.result import Result
from regard.report.words import budget_order, budget_text, clean, name, number, percent, short, times

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """Its head, a cell of it as HTML, and the sentence of the key that says what it is."""

    head: str
    write: Callable[[Row], str]
    says: str = ""


def result_columns(result: Result, rows: list[Row], marked: Marks) -> list[Column]:
    """Those that this run has numbers for; method, budget, quality and tasks always."""
    places = anchors(result)
    has = lambda *keys: any(row[key] for row in rows for key in keys)  # noqa: E731
    made = [
        Column("Method", lambda r: method_cell(r, marked, places)),
        Column("Budget", lambda r: cell(order_of(r["budget"]), budget_text(r["budget"]))),
        Column("Quality", quality_cell, "Below it: interval of 95 % of draws of the samples, in pairs with full "
               "attention; grey is below 95 %."),
        *(Column(task, lambda r, task=task: share(r["tasks"].get(task))) for task in result.tasks()),
        Column("Held", lambda r: cell(r["held"], percent(r["held"])), "Held: KV cache bytes kept."),
        Column("Read", lambda r: cell(r["read"], percent(r["read"])), "Read: bytes read per decoded token."),
        Column("Decode", lambda r: time_cell(r, "decode")),
        Column("Prefill", lambda r: time_cell(r, "prefill")),
    ]  # fmt: skip
    if has("scoring"):
        said = "Scoring: what deciding took after the prompt, within prefill, as a share of full attention's prefill."
        made.append(
            Column(
                "Scoring",
                lambda r: cell(r["scoring"], "" if r["scoring"] is None else percent(r["scoring"])),
                said,
            )
        )
    if has("calibration_s"):
        said = "Calibrated: seconds that finding the settings of a target took, once."
        made.append(
            Column("Calibrated", lambda r: cell(r["calibration_s"], seconds(r["calibration_s"])), said)
        )
    if has("agreement"):
        said = "Same token: how often the next token is full attention's."
        made.append(Column("Same token", lambda r: cell(r["agreement"], percent(r["agreement"])), said))
    if has("kl"):
        made.append(
            Column("KL", lambda r: cell(r["kl"], short(r["kl"])), "KL: divergence from its distribution.")
        )
    if has("failed", "missing"):
        made.append(Column("Failed", failed_cell, "Failed: cells without a number, missing ones too."))
    return made


def table_section(result: Result, marked: Marks) -> str:
    best = result.winner()
    rows = sorted(
        result.summary(), key=lambda r: (r["method"] != "full", not r["complete"], -(r["quality"] or 0))
    )
    columns = result_columns(result, rows, marked)
    write = lambda r: table_row(r, columns, best is not None and name(r) == name(best))  # noqa: E731
    body = "".join(family_rows(title, part, len(columns), write) for title, part in families(result, rows))
    heads = "".join(
        f'<th data-sort class="{"n" if i else ""}" scope="col">'
        f'<button type="button">{breakable(c.head)}</button></th>'
        for i, c in enumerate(columns)
    )
    lead = (
        "Quality, bytes and times are relative to full attention in the same cells: 100 % is as good, 0.50× takes half "
        "the time (geometric mean, below it ± spread). "
    )
    lead += (
        " ".join(c.says for c in columns if c.says)
        + " Press a head to sort; a name leads to the method's card."
    )
    table = f'<table class="results"><thead><tr>{heads}</tr></thead>{body}</table>'
    seek = '<label class="seek">Search <input type="search" id="search" autocomplete="off"></label>'
    return section("All methods", lead, f'{seek}<div class="wide">{table}</div>')


FOLDED = 16  # with more rows than these, families are folded
FRONT = "On a front: nothing is both cheaper and better"


def families(result: Result, rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows): full attention and what is on a Pareto front first, then the rest by what methods do."""
    if len(rows) <= FOLDED:
        return [("", rows)]
    front = {name(r) for key in COSTS for r in result.pareto(key)}
    kinds = result.run.get("families") or {}
    parts: dict[str, list[dict[str, Any]]] = {FRONT: []}
    for row in rows:
        first = row["method"] == "full" or name(row) in front
        title = FRONT if first else str(kinds.get(row["method"]) or "others")
        parts.setdefault(title, []).append(row)
    return [(title, parts[title]) for title in (FRONT, *sorted(set(parts) - {FRONT}))]


def family_rows(
    title: str, rows: list[dict[str, Any]], columns: int, write: Callable[[dict[str, Any]], str]
) -> str:
    """A family as a body of the table, folded but for the first; one without a title is the whole table."""
    body = "".join(map(write, rows))
    if not title:
        return f"<tbody>{body}</tbody>"
    folded = title != FRONT
    label = f"{escape(clean(title))} <span>{len(rows)}</span>"
    button = f'<button type="button" class="fold" aria-expanded="{str(not folded).lower()}">{label}</button>'
    css = "family folded" if folded else "family"
    head = f'<tr class="title"><th scope="rowgroup" colspan="{columns}">{button}</th></tr>'
    return f'<tbody class="{css}" data-folded="{str(folded).lower()}">{head}{body}</tbody>'


def order_of(budget: object) -> float:
    first, second, _ = budget_order(budget)
    return first * 1e15 + second


def method_cell(row: Row, marked: Marks, places: dict[str, str]) -> str:
    return f'<td><div class="who">{glyph(*marked[row["label"]])}{linked(row["label"], places)}</div></td>'


def quality_cell(row: Row) -> str:
    """The quality, and under it its interval."""
    low, high = row["quality_low"], row["quality_high"]
    ends = f"{100 * low:.0f}–{percent(high)}" if low is not None and high is not None else ""
    return under(share(row["quality"], "n q"), ends)


def time_cell(row: Row, what: str) -> str:
    """A ratio of times, and under it its spread."""
    ratio, spread = row[f"{what}_ratio"], row[f"{what}_spread"]
    around = f"± {spread:.2f}" if ratio is not None and spread is not None else ""
    return under(cell(ratio, times(ratio)), around)


def under(whole: str, more: str) -> str:
    """A cell with a second, smaller line."""
    return whole.replace("</td>", f" <small>{escape(more)}</small></td>") if more else whole


def seconds(value: object) -> str:
    return "" if number(value) is None else f"{value:.3g} s"


def failed_cell(row: Row) -> str:
    lost = row["failed"] + row["missing"]
    return cell(lost, str(lost) if lost else "", "n bad")


def table_row(row: Row, columns: list[Column], won: bool) -> str:
    label = escape(clean(f"{row['label']} {budget_text(row['budget'])}"))
    cells = "".join(column.write(row) for column in columns)
    return f'<tr data-label="{label}"{" class=won" if won else ""}>{cells}</tr>'
