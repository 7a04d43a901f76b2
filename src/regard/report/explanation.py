"""What `regard explain` found as one page, as a few lines for the terminal, and as a cell of a notebook.

All three begin with the same sentence, and all text of the model, of the prompt and of files is escaped where it is
written, with what would not be seen made visible.
"""

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from regard.report import explained_parts as parts
from regard.report.explained_check import checked
from regard.report.explained_figures import drop_figure, effect_map, faithfulness_figure
from regard.report.explained_words import (
    amounts,
    as_html,
    best_source,
    by_effect,
    facts,
    head_name,
    metric,
    notes,
    plain,
    quoted,
    sentences,
    token_name,
    top_tokens,
    visible,
)
from regard.report.html import page
from regard.report.terminal import right, table
from regard.report.token_map import FOR, rules, spans, text_box, top_table
from regard.report.token_map import scale as colours
from regard.report.whiskers import span
from regard.report.words import plural

Found = Mapping[str, Any]
STYLE = Path(__file__).with_name("explanation.css")
SHORT = 600  # tokens that a notebook shows as text; of a longer one its top tokens


def title(found: Found) -> str:
    """Tokens without the spaces around them."""
    target, foil = found["target"], found.get("foil")
    instead = "" if foil is None else f", not {quoted(foil.strip() or foil)}"
    model = visible(found.get("model") or "the model")
    return plain(f"Why {quoted(target.strip() or target)}{instead}: {model} explained")


def verdict(found: Found) -> str:
    """The sentences, then what to know before trusting them."""
    said = "".join(f"<p>{as_html(text)}</p>" for text in sentences(found))
    return f'<div class="answer">{said}</div>' + "".join(
        f'<p class="note">{as_html(note)}</p>' for note in notes(found)
    )


def explanation_page(found: Found) -> str:
    """The whole page as text; write it as UTF-8. A number that is not finite is an error that names its field."""
    found = checked(found)
    figures = drawn(found)
    body = [
        f"<h1>{escape(title(found))}</h1>",
        verdict(found),
        parts.facts_section(found),
        parts.text_section(found),
        parts.sources_section(found, "drop" in figures),
        parts.effects_section(found),
        parts.heads_section(found),
        parts.controls_section(found),
        parts.circuit_section(found),
        parts.faithfulness_section(found),
        parts.tested_section(found),
    ]
    style = STYLE.read_text(encoding="utf-8") + parts.style(found.get("sources") or [])
    data = {"figures": figures, "budget": None}
    return page(title(found), ['<main class="why">', *body, "</main>"], data, style)


def drawn(found: Found) -> dict[str, Any]:
    """The figures by the ids of their places."""
    figures = {
        "drop": drop_figure(found.get("sources") or [], metric(found)),
        "effects": effect_map(found["effects"]) if found.get("effects") else None,
        "faithfulness": faithfulness_figure(found["faithfulness"]) if found.get("faithfulness") else None,
    }
    return {at: figure for at, figure in figures.items() if figure is not None}


# a notebook


def explanation_snippet(found: Found) -> str:
    """HTML without scripts: the sentence, the text or its top tokens, the top heads and the controls."""
    found = checked(found)
    inside = [
        verdict(found),
        snippet_text(found),
        snippet_bars(found),
    ]
    style = f"<style>{NOTEBOOK}{STYLE.read_text(encoding='utf-8')}{rules('a', '.why.cell')}</style>"
    html = f'<div class="why cell">{style}{"".join(inside)}</div>'
    return html.encode("utf-8", "replace").decode("utf-8")


NOTEBOOK = (
    ".why.cell{color:#23272b;background:#fff;padding:10px 14px;max-width:1000px;font:14px/1.5 system-ui,sans-serif}"
    ".why.cell .answer{margin:0 0 8px;padding:8px 14px;border-left:4px solid #0072b2;background:#f6f6f2;font-size:15px}"
    ".why.cell .note{margin:4px 0;padding:4px 12px;border-left:4px solid #e69f00;background:#fdf7ea}"
    ".why.cell table{border-collapse:collapse;margin:8px 0;color:inherit;font-size:13.5px}"
    ".why.cell .short{color:#8b8f93}.why.cell .wide{overflow-x:auto}"
    ".why.cell th,.why.cell td{padding:2px 12px 2px 0;text-align:left;background:#fff;border-bottom:1px solid #ecece7}"
    ".why.cell .n{text-align:right;white-space:nowrap}.why.cell .text{max-height:260px}"
)


def snippet_text(found: Found) -> str:
    source = best_source(found)
    if source is None:
        return ""
    by = f"Scores by {escape(visible(source['method']))}"
    if len(found["tokens"]) > SHORT:
        return f"<p>{by}</p>{top_table(found['tokens'], source['scores'], 10, 'Score')}"
    top = max((abs(v) for v in source["scores"] if v is not None), default=0.0)
    return f"<p>{by} {colours(top, FOR)}</p>{text_box(spans(found, [source]))}"


def snippet_bars(found: Found) -> str:
    """The strongest heads and every control in one table, on one scale."""
    rows = [{**h, "name": head_name(h).capitalize()} for h in by_effect(found)[:5]]
    rows += found.get("controls") or []
    if not rows:
        return ""
    ends = span(rows)
    cells = [parts.bar_row(r, ends) for r in rows]
    return parts.rows_table([("", ""), ("Effect", ""), ("", "n")], cells, "bars")


# the terminal


def explanation_text(found: Found, width: int) -> str:
    """The sentence, the top heads with their intervals, the top tokens and the controls, in so many columns."""
    found = checked(found)
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    for said in (*sentences(found), *(f"Note: {note}" for note in notes(found))):
        console.print(Text(plain(said, TIED)))
    shown = {"Model", "Answer", "Metric", "Corruption", "Pairs"}
    console.print(
        Text("\n" + "\n".join(f"{n}: {plain(text)}" for n, text in facts(found) if n in shown) + "\n")
    )
    for name, rows, columns in terminal_tables(found):
        if rows:
            console.print(table(rows, columns, name))
    printed = out.getvalue().replace(TIED, " ")
    return "\n".join(line.rstrip() for line in printed.splitlines()).strip() + "\n"


TIED = "\ue000"  # a space where no line breaks: no visible text holds this character
ENDS = ("mean", "low", "high")


def terminal_tables(found: Found) -> list[tuple[str, list[dict[str, Any]], dict[str, str]]]:
    """Title, rows and columns of each table."""
    heads = by_effect(found)
    ends = {"mean": "effect", "low": "95 % from", "high": "to"}
    source = best_source(found)
    scores = source["scores"] if source else []
    top = top_tokens(scores, 8)
    tokens = [{"n": i, "token": plain(token_name(found, i)), "score": amounts(scores[i])[0]} for i in top]
    controls = [
        {"name": visible(r["name"]), "kind": "control" if r.get("control") else "", **numbers(r)}
        for r in found.get("controls") or []
    ]
    left = f"Top heads ({plural(len(heads) - 8, 'more')} on the page)" if len(heads) > 8 else "Top heads"
    return [
        (left, [{"head": head_name(h), **numbers(h)} for h in heads[:8]], {"head": "head"} | ends),
        (
            f"Top tokens by {visible(source['method'])}" if source else "",
            [{**row, "score": right(row["score"])} for row in tokens],
            {"n": "place", "token": "token", "score": "score"},
        ),
        ("Controls", controls, {"name": "what", "kind": ""} | ends),
    ]


def numbers(row: Found) -> dict[str, Any]:
    return {key: right(text) for key, text in zip(ENDS, amounts(*(row.get(k) for k in ENDS)), strict=True)}
