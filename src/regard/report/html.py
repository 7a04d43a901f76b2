"""A Result as one self-contained HTML page: no network, no fonts to load.

Two walls stand against hostile text from a model or a file: all of it is escaped where it is written, and the
page's own policy lets nothing be fetched and no script run but those written here, named by their hashes.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from regard.report.cards import titles
from regard.report.marks import Marks, glyph, marks
from regard.report.pieces import words
from regard.report.prefill import first_token_sentence, only_prompts
from regard.report.questions import questions
from regard.report.result import Result
from regard.report.sections import sections
from regard.report.shades import DARK, SWITCH, shades
from regard.report.words import budget_text, clean, name, plural

HERE = Path(__file__).parent
ERRORS = """"use strict";
const collected = [];
function collect(what) {
  collected.push(String(what));
  const at = document.getElementById("script-errors");
  if (at) { at.dataset.scriptErrors = String(collected.length); at.textContent = collected.join("\\n"); }
}
addEventListener("error", (event) => collect(event.message || event));
addEventListener("unhandledrejection", (event) => collect(event.reason));
addEventListener("securitypolicyviolation", (event) => collect(`policy ${event.violatedDirective}`));
"""


def to_html(result: Result) -> str:
    """The page as text; write it as UTF-8."""
    labels = {r["label"]: r["method"] for r in result.summary()}
    marked = marks(labels, next((label for label, method in labels.items() if method == "full"), None))
    figures, parts = sections(result, marked)
    title = f"Attention methods compared on {clean(result.run.get('model') or 'this model')}"
    return page(title, [HATCH, *head(result, title), legend(marked, titles(result)), *parts], figures)


def task_pages(result: Result) -> dict[str, str]:
    """File name -> a page of one task alone, where there are several."""
    tasks = result.tasks()
    if len(tasks) < 2:
        return {}
    parts = {task: [r for r in result.rows if str(r["task"]) == task] for task in tasks}
    return {file_of(task): to_html(Result(result.run, rows)) for task, rows in parts.items()}


def file_of(task: str) -> str:
    """The name of a task's page: "report-needle.html"; settings become a part of it."""
    return f"report-{re.sub(r'[^A-Za-z0-9_.-]+', '-', task).strip('-')}.html"


def links(result: Result) -> str:
    """To the pages of the tasks, from the page of them all."""
    tasks = result.tasks()
    if len(tasks) < 2:
        return ""
    each = [f'<a href="{file_of(task)}">{escape(clean(task))}</a>' for task in tasks]
    return f'<p class="meta">Each task by itself: {", ".join(each)}.</p>'


def page(title: str, body: list[str], data: dict[str, Any], style: str = "") -> str:
    """A whole page: escaped title, parts that are HTML already, and the figures that its script draws by their ids.

    `style` is CSS of its own, after that of every page.
    """
    scripts = [ERRORS, (HERE / "page.js").read_text(encoding="utf-8")]
    figures = data.get("figures") or {}
    known = {**data, "figures": list(figures), "dark": DARK}
    style = f"{shades()}{(HERE / 'page.css').read_text(encoding='utf-8')}{style}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy([*scripts, library() if figures else ""])}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{style}</style>",
        f"<script>{scripts[0]}</script>\n</head>\n<body>",
        '<div id="script-errors" data-script-errors="0" hidden></div>',
        SWITCH,
        *body,
        f'<script type="application/json" id="report-data">{embedded(known)}</script>',
        f'<script type="text/plain" id="figures">{packed(embedded(figures)) if figures else ""}</script>',
        f'<script type="text/plain" id="library">{plotly() if figures else ""}</script>',
        f"<script>{scripts[1]}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


@cache
def library() -> str:
    """The drawing library's source."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@cache
def plotly() -> str:
    """The library as it lies in the page: two fifths of its size."""
    return packed(library())


def packed(text: str) -> str:
    """Text as base85 of gzip, which the page unpacks; the same for the same text.

    A comma stands for `<`, by which a script element could end.
    """
    return base64.b85encode(gzip.compress(text.encode(), 9, mtime=0)).decode().replace("<", ",")


HATCH = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true">'
    '<pattern id="unmeasured" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect class="ground" width="5" height="5"/><path class="strokes" d="M0 5L5 0"/></pattern></svg>'
)


def policy(scripts: list[str]) -> str:
    """Nothing is fetched; only these scripts run."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def embedded(data: Any) -> str:
    """JSON that may stand in a script element: no `<`, so neither `</script>` nor `<!--` can occur in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def head(result: Result, title: str) -> list[str]:
    rows = [r for r in result.summary() if r["method"] != "full"]
    budgets = {budget_text(r["budget"]) for r in rows} - {""}
    counted = [plural(len({r["label"] for r in rows}), "method")]
    counted += [plural(len(budgets), "budget")] if budgets else []
    counted += [plural(len(result.tasks()), "task"), plural(len(result.lengths()), "length")]
    cells = plural(len(result.rows), "cell") + (f", {len(result.failed())} failed" if result.failed() else "")
    text = (
        f"{' × '.join(counted)}: {cells}. Started {clean(result.run.get('started') or 'at an unknown time')}."
    )
    notes = [f'<p class="note">{escape(note)}</p>' for note in result.notes()]
    return [
        f'<h1>{escape(title)}</h1><p class="meta">{escape(text)}</p>',
        answer(result),
        links(result),
        *notes,
    ]


def answer(result: Result) -> str:
    """The sentence, with the winner's name in bold; of methods for prompts that on the first token."""
    if only_prompts(result):
        return f'<p class="answer">{words(first_token_sentence(result))}</p>'
    best, sentence = result.winner(), result.sentence()
    first = clean(name(best)) if best else ""
    bold = f"<strong>{words(first)}</strong>" if first else ""
    asked = "".join(f"<dt>{words(q)}</dt><dd>{words(a)}</dd>" for q, a in questions(result))
    more = f'<dl class="asked">{asked}</dl>' if asked else ""
    return f'<p class="answer">{bold}{words(sentence.removeprefix(first))}</p>{more}'


def legend(marked: Marks, titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """The methods with their marks; `titles` are shown to a pointer that rests on one."""
    buttons = [
        f'<button type="button" data-method="{i}" aria-pressed="true" title="{escape(clean(titles.get(label, "")))}">'
        f"{glyph(*mark)}<span>{escape(clean(label))}</span></button>"
        for i, (label, mark) in enumerate(marked.items())
    ]
    every = [
        f'<button type="button" class="all" data-all="{v}">{t}</button>'
        for v, t in (("true", "all"), ("false", "none"))
    ]
    what = "Methods in the plots; press to hide or show"
    return f'<nav class="legend" aria-label="{what}">{"".join(buttons + every)}</nav>'
