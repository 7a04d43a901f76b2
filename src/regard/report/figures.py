"""The plots of the page as Plotly figures: plain dictionaries, so only the browser needs Plotly."""

import html
import math
from typing import Any

from regard.report.marks import Marks
from regard.report.result import Result, mean
from regard.report.words import KEEPS, budget_text, clean, name, number, percent, times

Figure = dict[str, Any]
INK, GRID, SOFT = "#333333", "#e9e9e6", "#6a6f74"
LABEL = 28  # letters of a name in a plot, that it stays inside
VEIL = "rgba(255,255,255,0.85)"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
COSTS = {
    "held": ("KV bytes held", "Bytes held, share of full attention"),
    "read": ("KV bytes read per token", "Bytes read per decoded token, share of full"),
    "decode_ratio": ("Decode time", "Decode time per token, × full attention"),
}


def plotted(text: object) -> str:
    """Text for a label in a plot, where Plotly would take `<b>` or `<a href>` as markup."""
    return html.escape(clean(text), quote=False)


def axis(title: str, **settings: Any) -> Figure:
    line = {
        "showline": True,
        "linecolor": "#bbbbb6",
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "outside",
    }
    small = {"ticklen": 4, "tickcolor": "#bbbbb6", "automargin": True}
    return {
        "title": {"text": plotted(title), "standoff": 8, "font": {"size": 12.5}},
        **line,
        **small,
        **settings,
    }


def layout(title: str, xaxis: Figure, yaxis: Figure, **more: Any) -> Figure:
    return {
        "title": {
            "text": f"<b>{plotted(title)}</b>",
            "x": 0,
            "xref": "paper",
            "y": 0.97,
            "font": {"size": 14.5},
        },
        "font": {"family": FONT, "size": 12, "color": INK},
        "margin": {"l": 58, "r": 16, "t": 42, "b": 52},
        "height": 350,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "#ffffff",
            "bordercolor": "#999999",
            "align": "left",
            "font": {"color": INK},
        },
        "xaxis": xaxis,
        "yaxis": yaxis,
        **more,
    }


def spread(values: list[float], pad: float, low: float, high: float) -> list[float]:
    """A range that shows all values and reaches from `low` to `high` where they lie closer."""
    return [min([low, *values]) - pad, max([high, *values]) + pad]


def cost_axis(xkey: str, values: list[float]) -> Figure:
    """Shares on a logarithmic axis once they span more than a factor of four, with ticks people read."""
    title, shares = COSTS[xkey][1], xkey != "decode_ratio"
    tick_text = percent if shares else lambda v: f"{v:g}×"
    if min(values) > 0 and max(values) / min(values) > 4:
        ends = [math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1]
        ticks = [
            d * 10.0**e
            for e in range(-4, 4)
            for d in (1, 2, 5)
            if ends[0] <= math.log10(d * 10.0**e) <= ends[1]
        ]
        return axis(
            title, type="log", range=ends, tickvals=ticks, ticktext=[tick_text(round(t, 6)) for t in ticks]
        )
    pad = 0.06 * (max(values) - min([*values, 0.8]))
    ends = [max(0.0, min([*values, 0.8]) - pad), max([*values, 1.0]) + pad]
    if not shares:
        return axis(title, range=ends, ticksuffix="×")
    ticks = [i / 5 for i in range(int(ends[1] * 5) + 1) if i / 5 >= ends[0]]
    return axis(title, range=ends, tickvals=ticks, ticktext=[percent(t) for t in ticks])


def bars(rows: list[dict[str, Any]]) -> Figure:
    """Intervals as error bars, hidden until they are asked for."""
    known = [r if None not in (r["quality"], *(number(r[k]) for k in ENDS)) else None for r in rows]
    reach = [[100 * abs(r[k] - r["quality"]) if r else 0 for r in known] for k in ENDS]
    return {
        "array": reach[1],
        "arrayminus": reach[0],
        "symmetric": False,
        "thickness": 1,
        "width": 2,
        "visible": False,
    }


ENDS = ("quality_low", "quality_high")


def hover(row: dict[str, Any]) -> str:
    lines = [f"<b>{plotted(name(row))}</b>", f"quality {percent(row['quality'])} of full"]
    if row["quality_low"] is not None:
        lines[1] += f" ({percent(row['quality_low'])} to {percent(row['quality_high'])})"
    lines += [f"held {percent(row['held'])}, read {percent(row['read'])}"]
    lines += [f"decode {times(row['decode_ratio'])}, prefill {times(row['prefill_ratio'])}"]
    if not row["complete"]:
        lines.append(f"{row['failed']} cells failed, {row['missing']} missing")
    return "<br>".join(lines)


def line_trace(x: list[Any], y: list[float], style: Figure) -> Figure:
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": style, "hoverinfo": "skip"}


def quality_cost(result: Result, xkey: str, marked: Marks) -> Figure | None:
    """Quality against one cost, a mark per method × budget, and the Pareto front; None if not measured."""
    rows = [r for r in result.summary() if number(r["quality"]) is not None and number(r[xkey]) is not None]
    if not rows:
        return None
    xaxis = cost_axis(xkey, [r[xkey] for r in rows])
    ends = [10**e for e in xaxis["range"]] if xaxis.get("type") == "log" else xaxis["range"]
    traces = [line_trace(ends, [100 * KEEPS] * 2, {"color": "#aaaaaa", "width": 1, "dash": "dot"})]
    steps = [(r[xkey], 100 * r["quality"]) for r in result.pareto(xkey)]
    if steps:
        dashed = {"color": "#555555", "width": 1.5, "dash": "dash"}
        traces.append(line_trace(*stairs(steps, ends[1]), dashed))
    for at, label in enumerate(marked):
        traces.append(method_trace(at, label, [r for r in rows if r["label"] == label], xkey, marked))
    at = {"xref": "paper", "xanchor": "right", "yanchor": "top", "bgcolor": VEIL}
    notes = [annotation(0.995, 100 * KEEPS, "95 % of full", **at)]
    best, yrange = result.winner(), spread([100 * r["quality"] for r in rows], 3, 85, 100)
    if best is not None and number(best[xkey]) is not None:
        traces.append(ring(best, xkey))
        notes.append(arrow(best, xkey, xaxis, yrange))
    yaxis = axis("Quality, share of full attention", range=yrange, ticksuffix=" %")
    return {"data": traces, "layout": layout(COSTS[xkey][0], xaxis, yaxis, annotations=notes)}


def method_trace(at: int, label: str, rows: list[dict[str, Any]], xkey: str, marked: Marks) -> Figure:
    colour, shape = marked[label]
    symbols = [shape if r["complete"] else f"{shape}-open" for r in rows]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotted(label),
        "x": [r[xkey] for r in rows],
        "y": [100 * r["quality"] for r in rows],
        "line": {"color": faint(colour), "width": 1.2},
        "marker": {
            "color": colour,
            "symbol": symbols,
            "size": 13 if shape == "star" else 9,
            "line": {"width": 1.2, "color": "#ffffff" if all(r["complete"] for r in rows) else colour},
        },
        "error_y": {**bars(rows), "color": colour},
        "hoverinfo": "text",
        "hovertext": [hover(r) for r in rows],
        "meta": {"method": at, "budget": None},
        "cliponaxis": False,
    }


def ring(best: dict[str, Any], xkey: str) -> Figure:
    """A ring around the winner, whose mark may lie under others."""
    line = {"width": 1.6, "color": INK}
    marker = {"symbol": "circle-open", "size": 18, "color": INK, "line": line}
    at = {"x": [best[xkey]], "y": [100 * best["quality"]]}
    return {"type": "scatter", "mode": "markers", **at, "marker": marker, "hoverinfo": "skip"}


def faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"


def stairs(steps: list[tuple[float, float]], end: float) -> tuple[list[float], list[float]]:
    """The front as a staircase: between two points the quality of the cheaper one is what can be had."""
    xs: list[float] = []
    ys: list[float] = []
    for x, y in steps:
        xs += [x, x] if ys else [x]
        ys += [ys[-1], y] if ys else [y]
    return [*xs, end], [*ys, ys[-1]]


def annotation(x: float, y: float, text: str, **settings: Any) -> Figure:
    return {
        "x": x,
        "y": y,
        "text": plotted(text),
        "showarrow": False,
        "font": {"size": 11, "color": SOFT},
        **settings,
    }


def arrow(best: dict[str, Any], xkey: str, xaxis: Figure, yrange: list[float]) -> Figure:
    """The winner by name, written towards the middle of the plot: below its mark, above one that lies low."""
    x = math.log10(best[xkey]) if xaxis.get("type") == "log" else best[xkey]
    across = (x - xaxis["range"][0]) / (xaxis["range"][1] - xaxis["range"][0])
    side = "left" if across < 0.3 else "right" if across > 0.7 else "center"
    text = clean(name(best))
    shown = text if len(text) <= LABEL else text[: LABEL - 1] + "…"
    low = (100 * best["quality"] - yrange[0]) / (yrange[1] - yrange[0]) < 0.5
    offset = {"ax": {"left": 28, "right": -28, "center": 0}[side], "ay": -64 if low else 64, "xanchor": side}
    style = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": SOFT, "standoff": 10}
    ink = {"size": 12, "color": INK}
    return annotation(x, 100 * best["quality"], shown, **style, **offset, bgcolor=VEIL, font=ink)


def length_ticks(lengths: list[int]) -> Figure:
    step = -(-len(lengths) // 8)
    shown = lengths[::-1][::step][::-1]
    text = [f"{n // 1024}k" if n >= 8192 and n % 1024 == 0 else str(n) for n in shown]
    logs = [math.log10(n) for n in lengths if n > 0] or [0.0]
    pad = 0.08 * (logs[-1] - logs[0]) or 0.2
    return {"type": "log", "range": [logs[0] - pad, logs[-1] + pad], "tickvals": shown, "ticktext": text}


def quality_length(result: Result, task: str, marked: Marks, budgets: list[str]) -> Figure | None:
    """Quality over length on one task, one line per method × budget; the page shows one budget at a time."""
    rows = [r for r in result.rows if str(r["task"]) == task]
    lengths = sorted({r["length"] for r in rows})
    traces = []
    for at, label in enumerate(marked):
        for budget in ["", *budgets]:
            mine = [
                r
                for r in rows
                if str(r.get("label") or r["method"]) == label and budget_text(r["budget"]) == budget
            ]
            points = [
                over_seeds([r for r in mine if r["length"] == n and r["status"] == "ok"], n) for n in lengths
            ]
            if any(p["quality"] is not None for p in points):
                traces.append(
                    length_trace(at, label, budget, points, marked, budgets.index(budget) if budget else None)
                )
    if not traces:
        return None
    exact = any(r["metric"] != "nll" for r in rows)
    values = [y for t in traces for y in t["y"] if y is not None]
    yaxis = axis(
        "Share of right answers" if exact else "Perplexity of full ÷ of method",
        range=spread(values, 3, 0 if exact else 90, 100),
        ticksuffix=" %",
    )
    return {
        "data": traces,
        "layout": layout(task, axis("Length, tokens", **length_ticks(lengths)), yaxis, height=330),
    }


def over_seeds(rows: list[dict[str, Any]], length: int) -> dict[str, Any]:
    return {"length": length, **{key: mean(r.get(key) for r in rows) for key in ("quality", *ENDS)}}


def length_trace(
    at: int, label: str, budget: str, points: list[Figure], marked: Marks, budget_index: int | None
) -> Figure:
    colour, shape = marked[label]
    full = shape == "star"
    who = f"{label} @ {budget}" if budget else label
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotted(who),
        "x": [p["length"] for p in points],
        "y": [None if p["quality"] is None else 100 * p["quality"] for p in points],
        "line": {"color": colour, "width": 2.2 if full else 1.5, "dash": "dot" if full else "solid"},
        "marker": {
            "color": colour,
            "symbol": shape,
            "size": 11 if full else 8,
            "line": {"width": 1, "color": "#ffffff"},
        },
        "error_y": {**bars(points), "color": colour},
        "hoverinfo": "text",
        "hovertext": [f"<b>{plotted(who)}</b><br>length {p['length']}: {point_text(p)}" for p in points],
        "meta": {"method": at, "budget": budget_index},
        "cliponaxis": False,
    }


def point_text(point: Figure) -> str:
    if number(point["quality_low"]) is None or number(point["quality_high"]) is None:
        return percent(point["quality"])
    return (
        f"{percent(point['quality'])} ({percent(point['quality_low'])} to {percent(point['quality_high'])})"
    )
