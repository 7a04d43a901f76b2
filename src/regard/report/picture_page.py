"""A comparison on images in the terminal, as Markdown, as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console

from regard.report.html import page
from regard.report.markdown import escape as plain
from regard.report.markdown import line
from regard.report.pictures import FULL, HEADS, KEYS, RANDOM, PictureResult, alike, apart, columns, in_points
from regard.report.terminal import in_parts, table
from regard.report.words import clean, plural

WIDE, TALL = 360, 24
STYLE = """
.forest { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.forest line.zero { stroke: var(--strong); } .forest line.whisker { stroke: var(--accent); stroke-width: 2; }
.forest .works line.whisker, .forest .works circle { stroke: #009e73; fill: #009e73; }
.forest .worse line.whisker, .forest .worse circle { stroke: #d55e00; fill: #d55e00; }
.forest circle { fill: var(--accent); } .forest text { fill: var(--ink); }
td.verdict { white-space: nowrap; }
td.verdict.works { color: var(--good); font-weight: 650; } td.verdict.worse { color: var(--bad); }
"""


def tone(verdict: str) -> str:
    if verdict in ("works", "above random"):
        return "works"
    return "worse" if verdict.startswith(("worse", "below", "failed", "memory", "timeout")) else ""


def metric(result: PictureResult, task: str) -> str:
    return str(result.of(task)[0]["metric"])


def show_pictures(result: PictureResult, console: Console) -> None:
    """Tables in the terminal, each in as many parts as its width asks for."""
    for task in result.tasks():
        rows = result.cells(task)
        heads = columns(rows, metric(result, task))
        for part in in_parts({k: h for k, h in heads.items() if k != "method"}, console.width - 34):
            console.print(table(rows, {"method": "method", **part}, clean(task)))
    readings = result.readings()
    if readings:
        rules = [key for key in readings[0] if not key.startswith("F1")]
        console.print(table(readings, rules, "the same answers, read by five rules (accuracy)"))
    console.print(clean(result.sentence()), highlight=False, markup=False)


def to_markdown(result: PictureResult) -> str:
    lines = [plain(result.sentence()), ""]
    for task in result.tasks():
        rows = result.cells(task)
        heads = columns(rows, metric(result, task))
        lines += [
            f"## {plain(task)}",
            "",
            line(list(heads.values())),
            line(["---", *["---:"] * (len(heads) - 1)]),
        ]
        lines += [line([plain(row[key]) for key in heads]) for row in rows] + [""]
    readings = result.readings()
    if readings:
        keys = list(readings[0])
        lines += ["## The same answers, read by five rules", "", line(keys), line(["---"] * len(keys))]
        lines += [line([plain(row[key]) for key in keys]) for row in readings] + [""]
    lines += [f"- {plain(r['label'])} on {plain(r['task'])}: {plain(r['status'])} ({plain(r['error'])[:200]})"
              for r in result.failed()]  # fmt: skip
    return "\n".join([*lines, "", KEYS, ""])


def to_html(result: PictureResult) -> str:
    title = f"Steering and visual tokens on {clean(result.run.get('model') or 'this model')}"
    methods = len({row["label"] for row in result.rows}) - 1
    meta = f"{plural(methods, 'method')} × {plural(len(result.tasks()), 'task')}. Started {result.run.get('started')}."
    body = [
        f'<h1>{escape(title)}</h1><p class="meta">{escape(clean(meta))}</p>',
        f'<p class="answer">{escape(result.sentence())}</p>',
        *(section(result, task) for task in result.tasks()),
        readings(result),
        failures(result),
        f'<h2>How to read it</h2><p>{escape(KEYS)}</p><p class="meta">{escape(clean(machine(result)))}</p>',
    ]
    return page(title, body, {"figures": {}, "budget": 0}, STYLE)


def machine(result: PictureResult) -> str:
    facts = result.run.get("machine") or {}
    cpu = facts.get("cpu") or facts.get("processor")
    return f"Measured on {cpu}, {facts.get('cores')} cores. {result.run.get('command', '')}"


def section(result: PictureResult, task: str) -> str:
    rows = result.cells(task)
    heads = columns(rows, metric(result, task))
    return f"<h2>{escape(clean(task))}</h2>{forest(result, task)}{html_table(rows, heads)}"


def html_table(rows: Sequence[Mapping[str, str]], heads: Mapping[str, str]) -> str:
    numbers = {key for key in heads if key not in ("method", "verdict")}
    top = "".join(f"<th{' class=n' if k in numbers else ''}>{escape(h)}</th>" for k, h in heads.items())
    lines = []
    for row in rows:
        cells = []
        for key in heads:
            kind = f"verdict {tone(row[key])}" if key == "verdict" else "" if key == "method" else "n"
            cells.append(f'<td class="{kind}">{escape(clean(row[key]))}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    inner = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="results">{inner}</table></div>'


def forest(result: PictureResult, task: str) -> str:
    """What each method gains over its control, and what each choice of tokens gains over random ones."""
    steered, reduced = [], []
    other = next((r for r in result.of(task) if r["method"] == RANDOM and r["status"] == "ok"), None)
    for row in result.of(task):
        if row["status"] != "ok" or row["method"] in (FULL, RANDOM):
            continue
        if row.get("kind_of_method") == "tokens":
            if other is not None and alike(row.get("kept"), other.get("kept")):
                reduced.append((row, row["quality"] - other["quality"], apart(row, other)))
        else:
            key = "over_control" if "over_control" in row else "gain"
            steered.append((row, row[key], row[f"{key}_interval"]))
    what = "the control" if metric(result, task) != "said" else "the model as it is"
    return drawn(result, steered, f"Points over {what}") + drawn(result, reduced, "Points over random tokens")


def drawn(result: PictureResult, rows: list, title: str) -> str:
    """Rows of (row, value, interval) as whiskers; right of the line is better."""
    if not rows:
        return ""
    reach = [end for _, _, interval in rows for end in interval]
    low, high = min(0.0, *reach), max(0.0, *reach)
    at = lambda x: 190 + (WIDE - 20) * (x - low) / max(high - low, 1e-6)  # noqa: E731
    height = TALL * len(rows) + 4
    marks = "".join(whisker(result, row, value, ends, i, at) for i, (row, value, ends) in enumerate(rows))
    zero = f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="0" y2="{height}"/>'
    size = f'viewBox="0 0 {WIDE + 200} {height}" width="{WIDE + 200}" role="img"'
    words = f"{title}: {100 * low:+.1f} to {100 * high:+.1f}; right of the line is better."
    return f'<svg class="forest" {size}>{zero}{marks}</svg><p class="meta">{escape(words)}</p>'


def whisker(
    result: PictureResult, row: Mapping[str, Any], value: float, ends: Sequence[float], i: int, at: Any
) -> str:
    y, (a, b) = TALL * i + 14, ends
    label = escape(clean(row["label"])[:26])
    said = in_points(value, ends)
    return (
        f'<g class="{tone(result.verdict(row))}"><title>{label}: {said}</title>'
        f'<text x="0" y="{y + 4}">{label}</text>'
        f'<line class="whisker" x1="{at(a):.1f}" x2="{at(b):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{at(value):.1f}" cy="{y}" r="3.5"/></g>'
    )


def readings(result: PictureResult) -> str:
    rows = result.readings()
    if not rows:
        return ""
    heads = {key: key for key in rows[0]}
    lead = (
        "One answer, read as OPERA, VCD, lmms-eval and VLMEvalKit read it, and by P(yes) of the first token."
    )
    head = "<h2>The same answers, read by five rules</h2>"
    return f'{head}<p class="lead">{escape(lead)}</p>{html_table(rows, heads)}'


def failures(result: PictureResult) -> str:
    rows = [f"<li>{escape(clean(r['label']))} on {escape(clean(r['task']))}: {escape(clean(r['status']))}: "
            f"{escape(clean(r['error']))}</li>" for r in result.failed()]  # fmt: skip
    return f"<h2>Failed</h2><ul>{''.join(rows)}</ul>" if rows else ""


__all__ = ["HEADS", "show_pictures", "to_html", "to_markdown"]
