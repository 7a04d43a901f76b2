"""Prompts that are read in part: what was read, where the time to the first token went, and from when it pays."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from regard.report.figures import INK, SOFT, Figure, axis, faint, layout, length_ticks, line_trace, plotted
from regard.report.marks import Marks, glyph
from regard.report.pieces import breakable
from regard.report.result import Result, mean, ok, over, ratio_mean
from regard.report.words import KEEPS, clean, percent, times

PARTS = ("estimate", "attention", "rest")


def label_of(row: Mapping[str, Any]) -> str:
    return str(row.get("label") or row["method"])


def partial_rows(result: Result) -> list[dict[str, Any]]:
    """A row for each method that leaves keys unread and each length: means over tasks and seeds."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in result.rows:
        if ok(row) and "rest_ms" in row:
            groups.setdefault((label_of(row), row["length"]), []).append(row)
    base = result.baseline()
    made = []
    for (label, length), rows in sorted(groups.items()):
        scored = [over(r["quality"], base.get((r["task"], length), {}).get("quality")) for r in rows]
        facts = {key: mean(r.get(key) for r in rows) for key in ("kept_share", "mass_share", "prefill_ms")}
        parts = {f"{name}_ms": mean(r.get(f"{name}_ms") for r in rows) for name in PARTS}
        made.append({"label": label, "length": length, "quality": mean(scored), "prefill_ratio":
                     ratio_mean(r.get("prefill_ratio") for r in rows), **facts, **parts})  # fmt: skip
    return made


def crossings(result: Result) -> dict[str, Mapping[str, Any]]:
    """What was found of each method: from which length on its first token comes sooner."""
    return {label_of(row): row for row in result.crossings if ok(row)}


def crossing_text(row: Mapping[str, Any] | None) -> str:
    """`1,024 tokens (724 to 1,448)`, or `none up to 4,096`.

    >>> crossing_text({"crossing": None, "length": 4096})
    'none up to 4,096'
    """
    if row is None:
        return "not measured"
    if row["crossing"] is None:
        return f"none up to {row['length']:,}"
    low, high = row.get("interval") or [None, None]
    ends = f" ({low:,} to {high:,})" if low and high and (low, high) != (row["crossing"],) * 2 else ""
    return f"{row['crossing']:,} tokens{ends}"


def soonest(result: Result) -> dict[str, Any] | None:
    """The row of the longest length that is soonest at its first token, of those that keep 95 % of quality."""
    rows = partial_rows(result)
    longest = max((row["length"] for row in rows), default=0)
    mine = [r for r in rows if r["length"] == longest and r["prefill_ratio"]]
    kept = [r for r in mine if (r["quality"] or 0) >= KEEPS - 1e-9]
    return min(kept, key=lambda r: r["prefill_ratio"], default=None)


def first_token_sentence(result: Result) -> str:
    """Which method is soonest at its first token, at the longest length, of those that keep 95 % of quality."""
    rows, best = partial_rows(result), soonest(result)
    if not rows:
        return ""
    longest = max(row["length"] for row in rows)
    if best is None:
        return f"At {longest:,} tokens no method that reads a prompt in part keeps 95 % of full attention's quality."
    text = f"At {longest:,} tokens {clean(best['label'])} is soonest at the first token of those that keep 95 % of "
    text += f"full attention's quality: {times(best['prefill_ratio'])} its time"
    text += f", reading {percent(best['kept_share'])} of the keys" if best["kept_share"] is not None else ""
    text += (
        f", which hold {percent(best['mass_share'])} of the attention"
        if best["mass_share"] is not None
        else ""
    )
    crossed = crossings(result).get(best["label"])
    return f"{text}. It pays from {crossing_text(crossed)} on." if crossed and crossed["crossing"] else (
        f"{text}. From which length on it pays: {crossing_text(crossed)}.")  # fmt: skip


def only_prompts(result: Result) -> bool:
    """Whether all methods are those that read prompts in part: what is kept of a cache says nothing of them."""
    others = [row for row in result.summary() if row["method"] != "full"]
    partial = {row["label"] for row in partial_rows(result)}
    return bool(others) and all(row["label"] in partial for row in others)


COLUMNS = ("method", "length", "quality", "first token", *PARTS, "read", "mass", "pays from")


def table_rows(result: Result) -> list[dict[str, str]]:
    """The rows as text; the parts are shares of the time to the first token."""
    found, seen, rows = crossings(result), set[str](), []
    for row in partial_rows(result):
        parts = {name: percent(over(row[f"{name}_ms"], row["prefill_ms"])) for name in PARTS}
        first = row["label"] not in seen
        seen.add(row["label"])
        rows.append({"method": clean(row["label"]), "length": f"{row['length']:,}", "quality": percent(row["quality"]),
                     "first token": times(row["prefill_ratio"]), **parts, "read": percent(row["kept_share"]),
                     "mass": percent(row["mass_share"]),
                     "pays from": crossing_text(found.get(row["label"])) if first else ""})  # fmt: skip
    return rows


def first_token_figure(result: Result, marked: Marks) -> Figure | None:
    """Milliseconds to the first token over length, the model's own dotted; a ring where a method begins to pay."""
    found = crossings(result)
    lines = {label: [(p["n"], p["ms"], p["ratio"]) for p in row["points"]] for label, row in found.items()}
    if not lines:
        return None
    own: dict[int, list[float]] = {}
    for row in found.values():
        for p in row["points"]:
            own.setdefault(p["n"], []).append(p["full_ms"])
    full = [(n, math.exp(sum(map(math.log, own[n])) / len(own[n]))) for n in sorted(own)]
    lengths = sorted(own)
    dotted = {"color": INK, "width": 2.2, "dash": "dot"}
    traces = [line_trace([n for n, _ in full], [ms for _, ms in full], dotted) | {
        "hoverinfo": "text", "hovertext": [f"<b>full</b><br>{n:,} tokens: {ms:.0f} ms" for n, ms in full]}]  # fmt: skip
    for at, label in enumerate(marked):
        if label in lines:
            traces += method_lines(at, label, lines[label], found[label]["crossing"], marked)
    shown = [n for n in lengths if n in {lengths[0], lengths[-1]} or n & (n - 1) == 0]
    values = [y for t in traces for y in t["y"] if y]
    ends = [math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08]
    ticks = log_ticks(ends)
    yaxis = axis(
        "Time to the first token",
        type="log",
        range=ends,
        tickvals=ticks,
        ticktext=[ms_text(t) for t in ticks],
    )
    return {"data": traces, "layout": layout("Time to the first token",
            axis("Length, tokens", **length_ticks(shown)), yaxis, height=380)}  # fmt: skip


def log_ticks(ends: list[float]) -> list[float]:
    """Round numbers between two powers of ten, finer ones where there would be fewer than two.

    >>> log_ticks([1.0, 2.0]), log_ticks([1.0, 1.1])
    ([10.0, 20.0, 50.0, 100.0], [10.0, 11.0, 12.0])
    """
    low, high = ends
    for digits in ((1, 2, 5), range(1, 10), [n / 10 for n in range(10, 100)]):
        ticks = [d * 10.0**e for e in range(-1, 7) for d in digits]
        inside = [round(t, 6) for t in ticks if low - 1e-9 <= math.log10(t) <= high + 1e-9]
        if len(inside) >= 2:
            break
    return inside


def ms_text(ms: float) -> str:
    """
    >>> [ms_text(x) for x in (0.5, 20.0, 5000.0)]
    ['0.5 ms', '20 ms', '5 s']
    """
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"


def method_lines(
    at: int, label: str, points: list[tuple[int, float, float]], crossing: int | None, marked: Marks
) -> list[Figure]:
    colour, shape = marked[label]
    trace = {
        "type": "scatter", "mode": "lines+markers", "name": plotted(label),
        "x": [n for n, _, _ in points], "y": [ms for _, ms, _ in points],
        "line": {"color": faint(colour), "width": 1.6},
        "marker": {"color": colour, "symbol": shape, "size": 8, "line": {"width": 1, "color": "#ffffff"}},
        "hoverinfo": "text",
        "hovertext": [f"<b>{plotted(label)}</b><br>{n:,} tokens: {ms:.0f} ms, {times(ratio)} of full"
                      for n, ms, ratio in points],
        "meta": {"method": at, "budget": None}, "cliponaxis": False,
    }  # fmt: skip
    if crossing is None:
        return [trace]
    where = next(ms for n, ms, _ in points if n == crossing)
    ring = {
        "type": "scatter", "mode": "markers+text", "x": [crossing], "y": [where], "text": [f"{crossing:,}"],
        "textposition": "bottom right", "textfont": {"size": 11, "color": SOFT},
        "marker": {"symbol": "circle-open", "size": 16, "color": colour, "line": {"width": 1.8, "color": colour}},
        "hoverinfo": "text", "hovertext": [f"<b>{plotted(label)}</b> pays from {crossing:,} tokens on"],
        "meta": {"method": at, "budget": None}, "cliponaxis": False,
    }  # fmt: skip
    return [trace, ring]


LEAD = (
    "Methods that leave keys of the prompt unread. First token: time of the prefill over full attention's, and the "
    "shares of it that went into choosing (estimate), attention, and the rest of the model. Read: share of the keys "
    "that queries might have seen. Mass: share of full attention's weight that lay on them. A ring marks from which "
    "length on a method is faster in every turn; below it full attention is the better choice."
)


def prefill_parts(result: Result, marked: Marks) -> tuple[Figure | None, str]:
    """(figure, table as HTML) of the section; nothing where no method leaves keys unread."""
    rows = table_rows(result)
    if not rows:
        return None, ""
    classes = ["", *["n"] * (len(COLUMNS) - 1)]
    heads = "".join(
        f'<th scope="col" class="{css}">{escape(h.capitalize())}</th>' for css, h in zip(classes, COLUMNS)
    )
    body = "".join(html_row(row, marked) for row in rows)
    return (
        first_token_figure(result, marked),
        f'<div class="wide"><table class="parts"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>',
    )


def html_row(row: Mapping[str, str], marked: Marks) -> str:
    labels = {clean(label): mark for label, mark in marked.items()}
    who = f'<td><div class="who">{glyph(*labels[row["method"]])}<span>{breakable(row["method"])}</span></div></td>'
    cells = [f'<td class="n">{escape(row[key])}</td>' for key in COLUMNS[1:]]
    return f"<tr>{who}{''.join(cells)}</tr>"
