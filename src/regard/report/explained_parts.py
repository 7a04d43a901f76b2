"""The sections of the page of an explanation, from the facts down. Each is a function from what was found to HTML.

A part that was not measured is left out, heading and all.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.report.circuit import MOST, circuit_svg, edge_table
from regard.report.explained_figures import limit_text, verified
from regard.report.explained_words import (
    amount,
    amounts,
    as_html,
    by_effect,
    drop_at,
    facts,
    head_name,
    metric,
    visible,
)
from regard.report.pieces import plot, section, words
from regard.report.token_map import (
    FOR,
    LETTERS,
    LONG,
    LOOKS,
    TOP,
    largest,
    looked_at,
    overview,
    rules,
    scale,
    sink_text,
    spans,
    strip,
    text_box,
    top_table,
    width,
)
from regard.report.whiskers import span, whisker
from regard.report.words import NONE, number, percent, plural

Found = Mapping[str, Any]
STRIP = 400  # of more tokens a row of attention is told by its top tokens


def esc(value: object) -> str:
    return escape(visible(value))


def rows_table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """A table of cells that are HTML already; a head is its text and the class of its column."""
    named = "".join(f'<th scope="col" class="{c}">{escape(text)}</th>' for text, c in heads)
    body = "".join(
        f"<tr>{''.join(f'<td class={c or chr(34) * 2}>{cell}</td>' for cell, (_, c) in zip(row, heads))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{css}"><thead><tr>{named}</tr></thead><tbody>{body}</tbody></table></div>'


def ends_text(row: Found | None) -> str:
    """A mean with its ends in brackets."""
    mean, low, high = amounts(*((row or {}).get(key) for key in ("mean", "low", "high")))
    return mean if NONE in (low, high) else f"{mean} ({low}\u00a0to\u00a0{high})"


def facts_section(found: Found) -> str:
    lines = [f"<dt>{escape(name)}</dt><dd>{as_html(text)}</dd>" for name, text in facts(found)]
    if found.get("command"):
        lines.append(f"<dt>Command</dt><dd><code>{esc(found['command'])}</code></dd>")
    return f'<dl class="facts">{"".join(lines)}</dl>'


# the text


def style(sources: Sequence[Found]) -> str:
    """The colours of every method, each under its radio button."""
    chosen = [
        rules(LETTERS[i], f".why:has(#source-{i}:checked)")
        + f".why:has(#source-{i}:checked) .only-{i}{{display:block}}"
        for i in range(len(sources))
    ]
    return "".join(chosen) + rules("z", ".why", LOOKS)


def text_section(found: Found) -> str:
    sources = found.get("sources") or []
    if not sources:
        return ""
    long = len(found["tokens"]) > LONG
    radios = "".join(
        f'<label><input type="radio" name="source" id="source-{i}"{" checked" * (i == 0)}> '
        f"{esc(s['method'])}{' (control)' * bool(s.get('control'))}</label>"
        for i, s in enumerate(sources)
    )
    chooser = f'<fieldset class="budgets"><legend>Scores by</legend>{radios}</fieldset>'
    legends = "".join(
        f'<div class="only only-{i}">{source_legend(s, long)}</div>' for i, s in enumerate(sources)
    )
    box = text_box(spans(found, sources, anchors=long))
    tables = "".join(
        f'<div class="only only-{i}">{top_table(found["tokens"], s["scores"], TOP, "Score")}</div>'
        for i, s in enumerate(sources)
    )
    after = f"<h3>The {TOP} largest scores, for or against</h3>{tables}" if long else ""
    lead = (
        "Every token coloured by what it does for the answer; point at one for its scores. A grey dot is a space, a "
        "grey sign a character that would not be seen."
    )
    if long:
        wide = plural(width(len(found["tokens"])), "token")
        lead += f" The strip is the whole text, {wide} to a bar: the largest score for (up) and against (down); a bar "
        lead += "leads to its place."
    return section("The text", lead, chooser + legends + box + after)


def source_legend(source: Found, long: bool) -> str:
    return scale(largest(source["scores"]), FOR) + (overview(source["scores"]) if long else "")


def sources_section(found: Found, drawn: bool) -> str:
    """How far each method's scores can be trusted."""
    sources = found.get("sources") or []
    ks = sorted({k for s in sources for k in (s.get("drop") or {}).get("k") or []})
    tried = [s for s in sources if s.get("lds") or s.get("drop")]
    if not tried:
        return ""
    heads = [("Method", "")] + [(f"Top {k:,} removed", "n") for k in ks]
    heads += [("LDS", "n")] * any(s.get("lds") for s in tried)
    rows = []
    for s in tried:
        name = esc(s["method"]) + (" <span class=short>control</span>" if s.get("control") else "")
        cells = [ends_text(drop_at(s, k)) for k in ks]
        cells += [ends_text(s.get("lds"))] * (len(heads) > len(ks) + 1)
        rows.append([name, *map(words, cells)])
    lead = (
        f"A method is right where removing the tokens that it scores highest lowers the {metric(found)} most, "
        "and more than removing random ones. LDS: rank correlation between what the scores foretell and what removing "
        "random parts of the text does; 1 is perfect. In brackets: 95 % intervals."
    )
    figure = plot("drop", {}, "Fall of the metric by tokens removed") if drawn else ""
    shown = f'<div class="plots" style="max-width:760px">{figure}</div>' if drawn else ""
    return section("Which scores to trust", lead, shown + rows_table(heads, rows))


# heads and controls


def effects_section(found: Found) -> str:
    effects = found.get("effects")
    if not effects:
        return ""
    exact, cells = verified(effects)
    how = ""
    if cells:
        how = f"A dot marks what was verified exactly ({exact:,} of {cells:,}); the rest is screened by gradients. "
        how = "Every cell was verified exactly. " if exact == cells else how
    agreement = number(effects.get("spearman"))
    if agreement is not None:
        how += f"Over those verified, screened and exact effects agree with a rank correlation of {amount(agreement)}. "
    counted = f"The unit is the {metric(found)}"
    if effects.get("normalised"):
        counted = "1 is the whole way from the corrupted run to the clean one"
    said = "The colour of the page is 0, orange speaks for the answer, blue against it."
    lead = f"{said} {counted}. {how}{limit_text(effects)}"
    width = 300 + 42 * (int(effects["heads"]) + 2 * bool(effects.get("mlp")))
    drawn = plot("effects", {}, "Effect of each head, by layer")
    return section(
        "Where in the model", lead, f'<div class="plots" style="max-width:{max(width, 560)}px">{drawn}</div>'
    )


def heads_section(found: Found) -> str:
    heads = by_effect(found)
    if not heads:
        return ""
    ends = span(heads)
    looks = any(h.get("attention") for h in heads)
    names = [("Head", ""), ("Effect", ""), ("", "n")] + [("The last query looks at", "")] * looks
    rows = []
    for head in heads:
        cells = [escape(head_name(head).capitalize()), whisker(head, ends), words(ends_text(head))]
        weights = (head.get("attention") or {}).get("weights")
        rows.append(cells + [looked_at(found, weights) if weights else ""] * looks)
    details = [head_details(found, head) for head in heads]
    first = next((i for i, text in enumerate(details) if text), 0)
    more = "".join(text.replace("<details>", "<details open>", i == first) for i, text in enumerate(details))
    lead = "Bars start at 0; whiskers are 95 % intervals. One that crosses 0 cannot be told from none." + (
        " Weights of attention, the first token left out." if looks else ""
    )
    return section("Top heads", lead, rows_table(names, rows, "bars") + more)


def head_details(found: Found, head: Found) -> str:
    """One head's row of attention over the text, and what its query and keys are made of."""
    parts = []
    if attention := head.get("attention"):
        weights, query = attention["weights"], attention.get("query")
        asked = f" of token {query}" if query is not None else ""
        said = f"Attention{asked}: {sink_text(weights)}"
        short = len(found["tokens"]) <= STRIP
        inside = [0.0, *weights[1:]]
        shown = strip(found, weights) if short else top_table(found["tokens"], inside, 8, "Weight", 0.02)
        parts.append(f'<p class="lead">{words(said)}</p>{shown}')
    if why := head.get("why"):
        rows = [[esc(w["query_part"]), esc(w["key_part"]), percent(w["share"])] for w in why]
        heads = [("Its query comes from", ""), ("the key from", ""), ("Share of the score", "n")]
        parts.append(rows_table(heads, [[*r[:2], words(r[2])] for r in rows]))
    if not parts:
        return ""
    return f"<details><summary>{escape(head_name(head).capitalize())}</summary>{''.join(parts)}</details>"


def bar_row(row: Found, ends: tuple[float, float]) -> list[str]:
    """A named effect as three cells."""
    name = esc(row["name"]) + (" <span class=short>control</span>" if row.get("control") else "")
    return [name, whisker(row, ends), words(ends_text(row))]


def controls_section(found: Found) -> str:
    rows = found.get("controls") or []
    if not rows:
        return ""
    ends = span(rows)
    cells = [bar_row(r, ends) for r in rows]
    lead = "What was done on purpose beside what should do nothing (grey), by the same measure."
    return section("Controls", lead, rows_table([("", ""), ("Effect", ""), ("", "n")], cells, "bars"))


# the circuit


def circuit_section(found: Found) -> str:
    graph = found.get("graph") or {}
    drawn = circuit_svg(graph) if graph.get("edges") else ""
    if not drawn:
        return ""
    edges = len(graph["edges"])
    shown = f"The {MOST} strongest of {edges} edges" if edges > MOST else plural(edges, "edge")
    of = f", of {graph['of']:,} that were scanned" if graph.get("of") else ""
    lead = (
        f"{shown}{of}. Read upwards: an edge is what one part hands to another, as its query (q), key (k) or value "
        "(v); the wider, the larger its effect; orange for the answer, blue and dashed against it."
    )
    table = f"<details><summary>The edges as a table</summary>{edge_table(graph)}</details>"
    return section("The circuit", lead, f'<div class="wide drawing" tabindex="0">{drawn}</div>{table}')


def faithfulness_section(found: Found) -> str:
    curve = found.get("faithfulness")
    if not curve:
        return ""
    signed = curve.get("signed")
    how = (
        []
        if signed is None
        else [f"Heads and MLPs are ranked by their {'signed' if signed else 'absolute'} effect"]
    )
    how += [f"the rest is under {visible(curve['ablation'])} ablation"] if curve.get("ablation") else []
    first = f"{', '.join(how)}. " if how else ""
    ends = "1 is what the whole model does, 0 what is left where every head and MLP is replaced"
    lead = f"{first}{ends}. Shaded: 95 % intervals."
    areas = [
        f"{name} {amount(curve[key])} ({said})"
        for key, name, said in (
            ("cpr", "CPR", "area under the curve: higher is better"),
            ("cmd", "CMD", "area between the curve and 1: lower is better"),
        )
        if curve.get(key) is not None
    ]
    drawn = plot("faithfulness", {}, "Faithfulness over the share of edges", "; ".join(areas))
    body = f'<div class="plots" style="max-width:760px">{drawn}</div>'
    return section("How much of the model the circuit is", lead, body)


def tested_section(found: Found) -> str:
    lines = "".join(f"<li>{words(visible(line))}</li>" for line in found.get("tested") or [])
    return section("What was tested", "", f'<ul class="tested">{lines}</ul>') if lines else ""
