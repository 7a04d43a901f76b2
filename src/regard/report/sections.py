"""The sections of the HTML page, from the plots down. Each is a function from a Result to HTML."""

from html import escape
from typing import Any

from regard.report.cards import apply_section, card_section
from regard.report.examples import cut, example_section
from regard.report.figures import COSTS, Figure, quality_cost, quality_length
from regard.report.marks import Marks
from regard.report.needle import needle_map, needle_tasks
from regard.report.pieces import plot, section
from regard.report.prefill import LEAD, first_token_sentence, prefill_parts
from regard.report.result import Result, failed_groups
from regard.report.results_table import table_section
from regard.report.turns import LEADS, TITLES, html_table, table_rows
from regard.report.turns import figures as drawn_by
from regard.report.words import budget_order, budget_text, clean, listing, name, plural, short


def sections(result: Result, marked: Marks) -> tuple[dict[str, Any], list[str]]:
    """The data for the page's script, and the sections from the plots down."""
    budget_of = {budget_text(r["budget"]): r["budget"] for r in result.summary() if r["budget"] is not None}
    budgets = sorted(budget_of, key=lambda text: budget_order(budget_of[text]))
    best = result.winner()
    first = budget_text(best["budget"]) if best else ""
    chosen = budgets.index(first) if first in budgets else len(budgets) // 2
    costs = {f"cost-{key}": quality_cost(result, key, marked) for key in COSTS}
    lengths = {
        f"length-{i}": quality_length(result, t, marked, budgets) for i, t in enumerate(result.tasks())
    }
    figures = {at: figure for at, figure in (costs | lengths).items() if figure is not None}
    prefill, table = prefill_parts(result, marked)
    figures |= {} if prefill is None else {"first-token": prefill}
    parts = [
        cost_section(result, costs),
        first_token_section(result, prefill, table),
        length_section(lengths, budgets, chosen),
        needle_section(result, marked),
    ]
    for key in TITLES:
        drawn = drawn_by(result, key, marked, budgets)
        figures |= drawn
        parts.append(part_section(result, key, drawn, marked))
    parts += [
        table_section(result, marked),
        failed_section(result),
        example_section(result, marked),
        card_section(result, marked),
        run_section(result),
        apply_section(result),
    ]
    return {"figures": figures, "budget": chosen}, parts


def cost_section(result: Result, figures: dict[str, Figure | None]) -> str:
    drawn = []
    for key, (title, _) in COSTS.items():
        names = [clean(name(r)) for r in result.pareto(key)]
        front = f"On the front, cheapest first: {listing(names)}." if names else ""
        drawn.append(plot(f"cost-{key}", figures[f"cost-{key}"], f"Quality against {title}", front))
    lead = (
        "Each mark is a method at one budget, the mean over tasks and lengths; its budgets are joined. Up "
        "and to the left is better. The dashed line is the Pareto front. Hollow marks lack cells and do not "
        "compete."
    )
    switch = '<label class="switch"><input type="checkbox" id="intervals"> Show intervals</label>'
    return section("Quality against cost", lead, f'{switch}<div class="plots">{"".join(drawn)}</div>')


def length_section(figures: dict[str, Figure | None], budgets: list[str], chosen: int) -> str:
    drawn = "".join(plot(at, figure, "Quality over length") for at, figure in figures.items())
    radios = "".join(
        f'<label><input type="radio" name="budget" value="{i}"{" checked" if i == chosen else ""}> '
        f"{escape(clean(b))}</label>"
        for i, b in enumerate(budgets)
    )
    chooser = f'<fieldset class="budgets"><legend>Budget</legend>{radios}</fieldset>' if budgets else ""
    lead = (
        "One plot per task, at one budget. Full attention (dotted) and methods without one are always shown."
    )
    return section("Quality over length", lead, f'{chooser}<div class="plots">{drawn}</div>')


def first_token_section(result: Result, figure: Figure | None, table: str) -> str:
    if not table:
        return ""
    drawn = plot("first-token", figure, "Time to the first token over length", first_token_sentence(result))
    return section("Time to the first token", LEAD, f'<div class="plots">{drawn}</div>{table}')


def part_section(result: Result, key: str, figures: dict[str, Figure], marked: Marks) -> str:
    """Quality by turn, or likelihood by place in a continuation; nothing where no row has several."""
    if not figures:
        return ""
    drawn = "".join(plot(at, figure, TITLES[key]) for at, figure in figures.items())
    table = html_table(table_rows(result, key), marked)
    return section(TITLES[key], LEADS[key], f'<div class="plots">{drawn}</div>{table}')


def needle_section(result: Result, marked: Marks) -> str:
    tasks = needle_tasks(result)
    if not tasks:
        return ""
    maps = "".join(f"<h3>{escape(clean(task))}</h3>{needle_map(result, task, marked)}" for task in tasks)
    lead = "Where in the text the answer stood, and whether it was found. Below a map: budget, share found."
    return section("Needle map", lead, maps)


def failed_section(result: Result) -> str:
    groups = failed_groups(result)
    if not groups:
        return ""
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("Method", "Tasks", "Lengths", "Status", "Reason"))
    body = "".join(
        f"<tr><td>{escape(clean(g['method']))}</td><td>{escape(clean(short(g['tasks'])))}</td>"
        f"<td>{escape(short(g['lengths']))}</td>"
        f'<td class="bad">{escape(clean(g["status"]))}</td><td class="said">{escape(cut(g["why"]))}</td></tr>'
        for g in groups
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    lead = f"{plural(len(result.failed()), 'cell')} did not finish; the means above are over the others."
    return section("Failed cells", lead, f'<div class="wide">{table}</div>')


def run_section(result: Result) -> str:
    """Where the numbers come from, field by field."""
    lines = []
    for key, value in result.run.items():
        if key not in ("kind", "cells", "cards", "attached", "families"):
            text = escape(cut(short(value), 2000))
            text = f"<code>{text}</code>" if key == "command" else text
            lines.append(f"<dt>{escape(clean(key))}</dt><dd>{text}</dd>")
    return section("Run", "", f"<dl>{''.join(lines)}</dl>") if lines else ""
