"""What methods said: a few answers of each beside those that were expected, wrong ones first."""

from collections.abc import Mapping
from html import escape
from typing import Any

from regard.report.marks import Marks, glyph
from regard.report.pieces import section
from regard.report.result import Result, ok
from regard.report.words import NONE, budget_text, clean, number, percent, plural, short


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
        plain = [("", clean(row["task"])), ("", budget_text(row["budget"])), ("Length", short(row["length"]))]
        plain.append(("Depth", percent(sample.get("depth"))))
        texts = [("Expected", cut(sample.get("answer", NONE))), ("Generated", cut(sample["generated"]))]
        cells = [sample_cell(head, said) for head, said in plain]
        cells += [sample_cell(head, said, "said") for head, said in texts]
        body.append(f'<tr>{"".join(cells)}<td class="{"bad" if bad else ""}">{verdict}</td></tr>')
    table = f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def sample_cell(head: str, said: str, css: str = "") -> str:
    """A cell that brings its head for screens on which the samples stand below one another."""
    return f'<td class="{css}"{f" data-head={head}" if head else ""}>{escape(said)}</td>'
