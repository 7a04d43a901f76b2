"""Several comparisons as one board: a row for each method and budget, a column for each model."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.core.errors import require
from regard.report.figures import quality_cost
from regard.report.html import HATCH, legend, page
from regard.report.markdown import escape as escape_markdown
from regard.report.markdown import line
from regard.report.marks import Marks, glyph, marks
from regard.report.pieces import cell, plot, section, share, words
from regard.report.questions import questions
from regard.report.result import Result, mean
from regard.report.words import budget_order, budget_text, clean, name, percent, times

Runs = Mapping[str, Result]
LEAD = (
    "Quality of a method at a budget, relative to full attention on the same model: mean over the run's tasks and "
    "lengths, with the interval of 95 % of draws of the samples, and the bytes that it holds. Mean: over the models on "
    "which it was measured. Models were asked different texts where their runs say so: compare down a column first."
)


def merged(runs: Sequence[Result]) -> dict[str, Result]:
    """Model -> what was found on it, by name; of several runs on one model the rows together, each cell once."""
    found: dict[str, dict[str, Any]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for run in runs:
        model = str(run.run.get("model") or "this model")
        heads.setdefault(model, run.run)
        found.setdefault(model, {}).update({row["key"]: row for row in run.rows})
    require(found, "a board is of at least one run", runs=len(runs))
    return {model: Result(heads[model], list(found[model].values())) for model in sorted(found)}


def board_rows(runs: Runs) -> list[dict[str, Any]]:
    """A row for each method and budget: its summary by model, and the mean quality of those that have every cell."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model, result in runs.items():
        for row in result.summary():
            at = row["label"], budget_text(row["budget"])
            known = rows.setdefault(at, {key: row[key] for key in ("method", "label", "budget")} | {"by": {}})
            known["by"][model] = row
    for row in rows.values():
        row["mean"] = mean(r["quality"] for r in row["by"].values() if r["complete"])
    key = lambda r: (r["method"] != "full", -len(r["by"]), -(r["mean"] or 0), budget_order(r["budget"]))  # noqa: E731
    return sorted(rows.values(), key=key)


def board_page(runs: Runs) -> str:
    """The board as one HTML page."""
    labels = {r["label"]: r["method"] for result in runs.values() for r in result.summary()}
    marked = marks(labels, next((label for label, method in labels.items() if method == "full"), None))
    figures = {f"board-{i}": quality_cost(result, "held", marked) for i, result in enumerate(runs.values())}
    drawn = "".join(
        plot(at, figure, f"Quality against bytes held on {model}", model)
        for (at, figure), model in zip(figures.items(), runs, strict=True)
    )
    title = (
        f"Attention methods on {len(runs)} models"
        if len(runs) > 1
        else f"Attention methods on {next(iter(runs))}"
    )
    body = [
        HATCH,
        f"<h1>{escape(clean(title))}</h1>",
        *(said(model, result) for model, result in runs.items()),
        legend(marked),
        section("Quality against bytes held", "", f'<div class="plots">{drawn}</div>'),
        board_table(runs, marked),
    ]
    known = {at: figure for at, figure in figures.items() if figure is not None}
    return page(clean(title), body, {"figures": known, "budget": 0})


def said(model: str, result: Result) -> str:
    """The answers of one model, folded beyond the first."""
    asked = "".join(f"<dt>{words(q)}</dt><dd>{words(a)}</dd>" for q, a in questions(result))
    return (
        f'<p class="answer">{words(result.sentence())}</p>'
        f'<details><summary>More of {escape(clean(model))}</summary><dl class="asked">{asked}</dl></details>'
    )


def board_table(runs: Runs, marked: Marks) -> str:
    heads = ["Method", "Budget", "Mean", *(h for model in runs for h in (model, "held", "decode"))]
    head = "".join(
        f'<th data-sort class="{"n" if i else ""}" scope="col"><button type="button">{escape(clean(h))}</button></th>'
        for i, h in enumerate(heads)
    )
    body = "".join(board_row(row, list(runs), marked) for row in board_rows(runs))
    seek = '<label class="seek">Search <input type="search" id="search" autocomplete="off"></label>'
    table = f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return section("All methods", LEAD, f'{seek}<div class="wide">{table}</div>')


def board_row(row: dict[str, Any], models: list[str], marked: Marks) -> str:
    order = budget_order(row["budget"])
    who = f'<div class="who">{glyph(*marked[row["label"]])}<span>{escape(clean(row["label"]))}</span></div>'
    cells = [
        f"<td>{who}</td>",
        cell(order[0] * 1e15 + order[1], budget_text(row["budget"])),
        share(row["mean"], "n q"),
    ]
    for model in models:
        found = row["by"].get(model)
        cells += three(found) if found else [cell(None, ""), cell(None, ""), cell(None, "")]
    label = escape(clean(f"{row['label']} {budget_text(row['budget'])}"))
    return f'<tr data-label="{label}">{"".join(cells)}</tr>'


def three(found: dict[str, Any]) -> list[str]:
    """Quality with its interval, bytes held, decode time."""
    low, high = found["quality_low"], found["quality_high"]
    text = percent(found["quality"])
    if low is not None and high is not None:
        text += f" ({100 * low:.0f}–{100 * high:.0f})"
    if not found["complete"]:
        text += " *"
    return [
        cell(found["quality"], text),
        cell(found["held"], percent(found["held"])),
        cell(found["decode_ratio"], times(found["decode_ratio"])),
    ]


def board_markdown(runs: Runs) -> str:
    """The same as a Markdown table, without decode times."""
    head = [
        "method",
        "budget",
        "mean",
        *(f"{h} {model}" for model in runs for h in ("quality on", "held on")),
    ]
    lines = [line([escape_markdown(h) for h in head]), line(["---", "---", *["---:"] * (len(head) - 2)])]
    for row in board_rows(runs):
        by = [row["by"].get(model) or {} for model in runs]
        shares = [percent(r.get(key)) for r in by for key in ("quality", "held")]
        who = [escape_markdown(row["label"]), budget_text(row["budget"]), percent(row["mean"])]
        lines.append(line([*who, *shares]))
    said = [escape_markdown(f"{model}: {result.sentence()}") + "\n" for model, result in runs.items()]
    return "\n".join([*said, *lines, ""])


def board_sentence(runs: Runs) -> str:
    """The methods that keep 95 % on every model, cheapest first."""
    kept = [{name(r) for r in result.keepers()} for result in runs.values()]
    both = [name(r) for r in next(iter(runs.values())).keepers() if all(name(r) in each for each in kept)]
    return f"95 % of full attention on every model: {', '.join(both[:4]) or 'none'}."
