"""Training runs as HTML pages: what one came to, its loss and its score over the steps; several side by side."""

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


def several_page(
    run: dict[str, Any], rows: list[dict[str, Any]], result: dict[str, Any], folders: dict[str, str]
) -> str:
    """Runs of several mechanisms side by side, each at its best rate; `rows` say of which run they are.

    folders  name of a run -> its folder beside this page, which holds the run's own report
    """
    marked, runs = marks(result["runs"], None), result["runs"]
    score = next(iter(runs.values()))["score_name"]
    drawn = {
        "loss": curve(rows, "loss", "Training loss", "nats", marked, log=True, by="run"),
        "score": curve(rows, "score", f"Held-out {score}", score, marked, by="run"),
    }
    body = [
        f"<h1>{escape(clean(run['title']))}</h1>",
        f'<p class="answer">{escape(clean(result["sentence"]))}</p>',
        legend(marked, ""),
        section("Curves", "One line for each mechanism, at its best learning rate.",
                "".join(plot(name, figure, figure["layout"]["title"]["text"]) for name, figure in drawn.items())),
        section("Results", "Each name leads to the run's own report, with all its rates.", beside(runs, folders)),
        section("Settings", "The same command with the same settings goes on where the runs were stopped.",
                listed(run["settings"])),
    ]  # fmt: skip
    return page(clean(run["title"]), body, {"figures": drawn, "budget": 0})


def beside(runs: dict[str, dict[str, Any]], folders: dict[str, str]) -> str:
    """A row for each run: its best rate, its score, its facts."""
    rows = []
    for name, result in runs.items():
        facts = {"best rate": result["rate"], result["score_name"]: result["score"], **result["facts"]}
        if "judged" in result:
            facts[f"right of {result['judged on']} others"] = result["judged"]
        link = f'<a href="{escape(folders[name], quote=True)}/report.html">{escape(clean(name))}</a>'
        rows.append((link, {key: escape(clean(short(value))) for key, value in facts.items()}))
    head = "".join(f"<th>{escape(clean(key))}</th>" for key in ("", *rows[0][1]))
    lines = "".join(
        f"<tr><th>{link}</th>{''.join(f'<td>{v}</td>' for v in facts.values())}</tr>" for link, facts in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def curve(
    rows: list[dict], key: str, title: str, unit: str, marked: Marks, log: bool = False, by: str = "rate"
) -> Figure:
    """One line for each value of `by`, a rate or a run, over the steps."""
    traces, word = [], "rate " if by == "rate" else ""
    for rate, (colour, *_) in marked.items():
        points = [(r["step"], r[key]) for r in rows if str(r[by]) == rate and r.get(key) is not None]
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": plotted(f"{word}{rate}"),
                "x": [p[0] for p in points], "y": [p[1] for p in points],
                "line": {"color": colour, "width": 1.5}, "marker": {"size": 4},
                "hovertemplate": f"step %{{x}}<br>{plotted(unit)} %{{y:.4g}}<extra>{word}{plotted(rate)}</extra>",
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


def legend(marked: Marks, word: str = "rate ") -> str:
    return '<p class="meta">' + " &nbsp; ".join(
        f"{glyph(*mark)} {word}{escape(clean(rate))}" for rate, mark in marked.items()
    ) + "</p>"  # fmt: skip


def listed(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(clean(name))}</th><td>{escape(clean(short(value)))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"
