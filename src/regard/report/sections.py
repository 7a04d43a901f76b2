"""The sections of the HTML page, from the plots down. Each is a function from a Result to HTML."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from regard.report.figures import COSTS, Figure, quality_cost, quality_length
from regard.report.marks import Marks, glyph
from regard.report.needle import needle_map, needle_tasks
from regard.report.prefill import LEAD, first_token_sentence, prefill_parts
from regard.report.result import Result, failed_groups, ok
from regard.report.turns import LEADS, TITLES, html_table, table_rows
from regard.report.turns import figures as drawn_by
from regard.report.words import (
    KEEPS,
    NONE,
    budget_order,
    budget_text,
    clean,
    listing,
    name,
    number,
    percent,
    plural,
    short,
    times,
)


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
        run_section(result),
    ]
    return {"figures": figures, "budget": chosen}, parts


def words(text: str) -> str:
    """Text of ours as HTML; a number stays on one line with its per cent."""
    return escape(text).replace(" %", "&nbsp;%")


def section(title: str, lead: str, body: str) -> str:
    intro = f'<p class="lead">{words(lead)}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{intro}{body}</section>"


def plot(at: str, figure: Figure | None, what: str, caption: str = "") -> str:
    below = f"<figcaption>{words(caption)}</figcaption>" if caption else ""
    if figure is None:
        return f'<figure><p class="meta">{escape(what)}: not measured.</p></figure>'
    return (
        f'<figure><div class="plot" id="{at}" role="img" aria-label="{escape(what)}"></div>{below}</figure>'
    )


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


def cell(value: object, text: str, css: str = "n") -> str:
    plain = number(value)
    return f'<td class="{css}" data-value="{"" if plain is None else plain}">{escape(text)}</td>'


def share(value: float | None, css: str = "n") -> str:
    return cell(value, percent(value), css + (" short" if value is not None and value < KEEPS - 1e-9 else ""))


HEADS = ("Method", "Budget", "Quality", "Interval")
TAIL = ("Held", "Read", "Decode", "Prefill", "Same token", "KL", "Failed")


def table_section(result: Result, marked: Marks) -> str:
    tasks, best = result.tasks(), result.winner()
    rows = sorted(
        result.summary(), key=lambda r: (r["method"] != "full", not r["complete"], -(r["quality"] or 0))
    )
    write = lambda r: table_row(r, tasks, marked, best is not None and name(r) == name(best))  # noqa: E731
    columns = [*HEADS, *tasks, *TAIL]
    body = "".join(family_rows(title, part, len(columns), write) for title, part in families(result, rows))
    heads = "".join(
        f'<th data-sort class="{"n" if i else ""}" scope="col">'
        f'<button type="button">{escape(clean(h))}</button></th>'
        for i, h in enumerate(columns)
    )
    lead = (
        "Quality, bytes and times are relative to full attention in the same cells: 100 % is as good, "
        "0.50× takes half the time (geometric mean ± spread). Grey is below 95 %. Interval: of 95 % of draws "
        "of the samples, in pairs with full attention. Held: KV cache bytes kept. "
        "Read: bytes read per decoded token. Same token: how often the next token is full attention's. "
        "KL: divergence from its distribution. Press a head to sort."
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


def spread_text(ratio: float | None, spread: float | None) -> str:
    return times(ratio) + (f" ± {spread:.2f}" if ratio is not None and spread is not None else "")


def table_row(row: dict[str, Any], tasks: list[str], marked: Marks, won: bool) -> str:
    low, high = row["quality_low"], row["quality_high"]
    interval = f"{100 * low:.0f}–{percent(high)}" if low is not None and high is not None else NONE
    lost = row["failed"] + row["missing"]
    order = budget_order(row["budget"])
    cells = [
        f'<td><div class="who">{glyph(*marked[row["label"]])}<span>{escape(clean(row["label"]))}</span>'
        "</div></td>",
        cell(order[0] * 1e15 + order[1], budget_text(row["budget"])),
        share(row["quality"], "n q"),
        cell(low, interval),
        *(share(row["tasks"].get(task)) for task in tasks),
        cell(row["held"], percent(row["held"])),
        cell(row["read"], percent(row["read"])),
        cell(row["decode_ratio"], spread_text(row["decode_ratio"], row["decode_spread"])),
        cell(row["prefill_ratio"], spread_text(row["prefill_ratio"], row["prefill_spread"])),
        cell(row["agreement"], percent(row["agreement"])),
        cell(row["kl"], short(row["kl"])),
        cell(lost, str(lost) if lost else "", "n bad"),
    ]
    label = escape(clean(f"{row['label']} {budget_text(row['budget'])}"))
    return f'<tr data-label="{label}"{" class=won" if won else ""}>{"".join(cells)}</tr>'


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


def cut(text: object, most: int = 400) -> str:
    """What a model or an error said, with its line breaks, without control characters, cut if long."""
    lines = "\n".join(clean(line) for line in str(text).splitlines())
    return lines if len(lines) <= most else f"{lines[:most]} … ({len(lines)} characters)"


def wrong(row: Mapping, sample: Mapping) -> bool:
    """Whether an answer is wrong; a text whose likelihood is compared is no answer."""
    return row.get("metric") != "nll" and (number(sample.get("score")) or 0) < 1


def examples(rows: list[dict[str, Any]], most: int = 6) -> list[tuple[dict[str, Any], Mapping]]:
    """A few samples of a method: wrong ones first, then others, over its tasks and budgets."""
    pairs = [(r, s) for r in rows if ok(r) for s in r.get("samples") or [] if "generated" in s]
    bad = round_robin([pair for pair in pairs if wrong(*pair)])
    rest = round_robin([pair for pair in pairs if not wrong(*pair)])
    take = max(most - 2, most - len(rest))
    return [*bad[:take], *rest[: most - len(bad[:take])]]


def round_robin(pairs: list[tuple[dict[str, Any], Mapping]]) -> list[tuple[dict[str, Any], Mapping]]:
    """The same samples, one of each (task, budget) before the second of any."""
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for row, sample in pairs:
        at = (str(row["task"]), budget_text(row["budget"]))
        seen[at] = seen.get(at, 0) + 1
        ranked.append((seen[at], row, sample))
    return [(row, sample) for _, row, sample in sorted(ranked, key=lambda r: r[0])]


def example_section(result: Result, marked: Marks) -> str:
    parts: list[str] = []
    for label, mark in marked.items():
        rows = [r for r in result.rows if str(r.get("label") or r["method"]) == label]
        chosen = examples(rows)
        if chosen:
            pairs = [(r, s) for r in rows if ok(r) for s in r.get("samples") or []]
            answers = [wrong(r, s) for r, s in pairs if r.get("metric") != "nll"]
            texts = len(pairs) - len(answers)
            counts = [f"{sum(answers)} of {plural(len(answers), 'answer')} wrong"] if answers else []
            counts += [f"{plural(texts, 'text')} by perplexity"] if texts else []
            count = f"<span>{', '.join(counts)}</span>"
            head = f"<summary>{glyph(*mark)} {escape(clean(label))} {count}</summary>"
            parts.append(f"<details{'' if parts else ' open'}>{head}{example_table(chosen)}</details>")
    if not parts:
        return ""
    lead = "Generated against expected answers, wrong ones first. Text is shown as the model wrote it."
    return section("Examples", lead, "".join(parts))


def example_table(chosen: list[tuple[dict[str, Any], Mapping]]) -> str:
    columns = ("Task", "Budget", "Length", "Depth", "Expected", "Generated", "Score")
    heads = "".join(f'<th scope="col">{h}</th>' for h in columns)
    body = []
    for row, sample in chosen:
        score, bad = number(sample.get("score")) or 0.0, wrong(row, sample)
        verdict = "✓ right" if not bad else "✗ wrong" if score <= 0 else f"{score:.2f}"
        if row.get("metric") == "nll":
            verdict = f"{score:.2f}, perplexity of full ÷ of method"
        cells = [
            clean(row["task"]),
            budget_text(row["budget"]),
            short(row["length"]),
            percent(sample.get("depth")),
        ]
        texts = [cut(sample.get("answer", NONE)), cut(sample["generated"])]
        body.append(
            f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells)}"
            f"{''.join(f'<td class=said>{escape(c)}</td>' for c in texts)}"
            f'<td class="{"bad" if bad else ""}">{verdict}</td></tr>'
        )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def run_section(result: Result) -> str:
    """Where the numbers come from, field by field."""
    lines = []
    for key, value in result.run.items():
        if key not in ("kind", "cells"):
            text = escape(cut(short(value), 2000))
            text = f"<code>{text}</code>" if key == "command" else text
            lines.append(f"<dt>{escape(clean(key))}</dt><dd>{text}</dd>")
    return section("Run", "", f"<dl>{''.join(lines)}</dl>") if lines else ""
