"""A training run as one HTML page: what it came to, its loss and its score over the steps."""

from html import escape
from typing import Any

from regard.report.figures import Figure, axis, layout, plotted
from regard.report.html import page
from regard.report.marks import Marks, glyph, marks
from regard.report.pieces import plot, section
from regard.report.words import clean, short


def training_page(run: dict[str, Any], rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """`rows` are the points of the curves: rate, step, loss, and the score where it was measured."""
    rates = list(dict.fromkeys(str(row["rate"]) for row in rows))
    marked = marks({rate: rate for rate in rates}, None)
    score = result["score_name"]
    unit = "nats per scored token" if result.get("confusion") is None else "nats per image"
    drawn = {"loss": curve(rows, "loss", "Training loss", unit, marked, log=True)}
    if any(row.get("score") is not None for row in rows):
        drawn["score"] = curve(rows, "score", f"Held-out {score}", score, marked)
    confused = result.get("confusion")
    if confused is not None:
        drawn["confusion"] = confusion(confused)
    body = [
        f"<h1>{escape(clean(run['title']))}</h1>",
        f'<p class="answer">{escape(clean(result["sentence"]))}</p>',
        legend(marked),
        section("Curves", "One line for each learning rate.",
                "".join(plot(name, figure, figure["layout"]["title"]["text"]) for name, figure in drawn.items()
                        if name != "confusion")),
        section("Answers", f"Of the best model on {result['judged on']} images that nothing was chosen on: "
                f"{result['judged']:.1%} are right. The squares count images.",
                plot("confusion", drawn["confusion"], "Answers")) if confused is not None else "",
        section("Result", "", listed({"best rate": result["rate"], **result["scores"], **result["facts"]})),
        section("Settings", "The same command with the same settings goes on where a run was stopped.",
                listed(run["settings"])),
    ]  # fmt: skip
    return page(clean(run["title"]), body, {"figures": drawn, "budget": 0})


def curve(rows: list[dict], key: str, title: str, unit: str, marked: Marks, log: bool = False) -> Figure:
    traces = []
    for rate, (colour, *_) in marked.items():
        points = [(r["step"], r[key]) for r in rows if str(r["rate"]) == rate and r.get(key) is not None]
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": plotted(f"rate {rate}"),
                "x": [p[0] for p in points], "y": [p[1] for p in points],
                "line": {"color": colour, "width": 1.5}, "marker": {"size": 4},
                "hovertemplate": f"step %{{x}}<br>{plotted(unit)} %{{y:.4g}}<extra>rate {plotted(rate)}</extra>",
            }
        )  # fmt: skip
    yaxis = axis(unit, **({"type": "log"} if log else {}))
    return {"data": traces, "layout": layout(title, axis("steps"), yaxis)}


def confusion(found: dict[str, Any]) -> Figure:
    """Counts of images by what they show and what was answered; squares without any are empty."""
    counts = [[count or None for count in row] for row in found["counts"]]
    said = (
        f"{plotted(found['row'])} %{{y}}<br>{plotted(found['column'])} %{{x}}<br>%{{z}} images<extra></extra>"
    )
    trace = {
        "type": "heatmap", "z": counts, "x": found["columns"], "y": found["rows"], "showscale": False,
        "colorscale": [[0, "#dde7f0"], [1, "#1f5f99"]], "xgap": 1, "ygap": 1, "hoverongaps": False,
        "text": [[str(count or "") for count in row] for row in found["counts"]], "texttemplate": "%{text}",
        "hovertemplate": said,
    }  # fmt: skip
    whole = {"type": "category", "showgrid": False}
    side = {"height": 120 + 26 * len(found["rows"])}
    yaxis = axis(found["row"], autorange="reversed", **whole)
    return {"data": [trace], "layout": {**layout("Answers", axis(found["column"], **whole), yaxis), **side}}


def legend(marked: Marks) -> str:
    return '<p class="meta">' + " &nbsp; ".join(
        f"{glyph(*mark)} rate {escape(clean(rate))}" for rate, mark in marked.items()
    ) + "</p>"  # fmt: skip


def listed(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(clean(name))}</th><td>{escape(clean(short(value)))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"
