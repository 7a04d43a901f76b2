"""The plots of an explanation as Plotly figures: effects by layer and head, removal of tokens, faithfulness."""

from collections.abc import Mapping, Sequence
from typing import Any

from regard.report.explained_words import amounts, visible, with_interval
from regard.report.figures import Figure, axis, faint, layout, plotted
from regard.report.marks import COLOURS
from regard.report.words import number, percent

Found = Mapping[str, Any]
GREY, LINE = "#8b8f93", "#0072b2"
# zero is white, as wide a step to either side
DIVERGING = [[0.0, "#0b5c97"], [0.25, "#7fb4dc"], [0.5, "#ffffff"], [0.75, "#f0a56a"], [1.0, "#b84a00"]]


def limit(effects: Found) -> float:
    """Where the colours end: at the largest head, so that a mighty MLP does not whiten them."""
    heads = [abs(v) for row in effects["mean"] for v in map(number, row) if v is not None]
    return max(heads, default=0.0) or 1.0


def effect_map(effects: Found) -> Figure:
    """Layers from the bottom to the top, a column for each head, and the MLP beside them."""
    layers, names = [str(n) for n in effects["layers"]], [str(i) for i in range(int(effects["heads"]))]
    heads = {**effects, "names": names, "what": "head"}
    traces = [heat(heads, layers), dots(heads, layers)]
    axes: Figure = {}
    if mlp := effects.get("mlp"):
        # as a matrix of one column
        column = {key: [[v] for v in values] for key, values in mlp.items() if values is not None}
        beside = {**column, "names": ["MLP"], "what": "MLP"}
        traces += [trace | {"xaxis": "x2"} for trace in (heat(beside, layers), dots(beside, layers))]
        split = min(0.955, 1 - 1.6 / (len(names) + 2))
        axes = {"xaxis2": cells_axis("", 1, domain=[split + 0.015, 1], ticks="")}
    top = limit(effects)
    bar = {"thickness": 12, "len": 1, "outlinewidth": 0}
    xaxis = cells_axis("Head", len(names), domain=[0, split if axes else 1])
    yaxis = cells_axis("Layer", len(layers))
    colours = {"colorscale": DIVERGING, "cmin": -top, "cmax": top, "colorbar": bar}
    height = min(1000, max(260, 110 + 18 * len(layers)))
    return {"data": traces, "layout": untitled(xaxis, yaxis, coloraxis=colours, height=height, **axes)}


def cells_axis(title: str, cells: int, **more: Any) -> Figure:
    """An axis of so many cells, without room around them."""
    return axis(title, type="category", showgrid=False, range=[-0.5, cells - 0.5], **more)


def heat(effects: Found, layers: Sequence[str]) -> Figure:
    said = [
        [hover(effects, layer, i, j) for j in range(len(effects["names"]))] for i, layer in enumerate(layers)
    ]
    return {
        "type": "heatmap",
        "x": effects["names"],
        "y": list(layers),
        "z": effects["mean"],
        "coloraxis": "coloraxis",
        "hoverinfo": "text",
        "text": said,
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
    }


def hover(effects: Found, layer: str, i: int, j: int) -> str:
    row = {key: cell(effects.get(key), i, j) for key in ("mean", "low", "high", "exact")}
    name = f"layer {layer} MLP" if effects["what"] == "MLP" else f"layer {layer} head {j}"
    how = "verified exactly" if row["exact"] else "screened by gradients"
    return f"<b>{name}</b><br>{with_interval(row)}" + (f"<br>{how}" if row["exact"] is not None else "")


def cell(matrix: Sequence[Sequence[Any]] | None, i: int, j: int) -> Any:
    return None if matrix is None else matrix[i][j]


def dots(effects: Found, layers: Sequence[str]) -> Figure:
    """A dot in each cell that was verified exactly."""
    exact = effects.get("exact") or [[] for _ in layers]
    size = 5 if max(len(layers), len(effects["names"])) <= 40 else 3
    places = [
        (layer, effects["names"][j]) for layer, row in zip(layers, exact) for j, e in enumerate(row) if e
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for _, x in places],
        "y": [y for y, _ in places],
        "marker": {"size": size, "color": "#23272b", "line": {"width": 0.2 * size, "color": "#ffffff"}},
        "hoverinfo": "skip",
    }


def verified(effects: Found) -> tuple[int, int]:
    """How many cells were verified exactly, of how many."""
    columns = [effects.get("exact") or [], [[e] for e in (effects.get("mlp") or {}).get("exact") or []]]
    cells = [bool(e) for matrix in columns for row in matrix for e in row]
    return sum(cells), len(cells)


def untitled(xaxis: Figure, yaxis: Figure, top: int = 16, **more: Any) -> Figure:
    """A layout under a heading of the page, which is title enough."""
    made = layout("", xaxis, yaxis, **more)
    return {key: v for key, v in made.items() if key != "title"} | {"margin": made["margin"] | {"t": top}}


# removing tokens


def drop_figure(sources: Sequence[Found], metric: str) -> Figure | None:
    """How far the metric falls once the top k tokens of each method are removed, beside random ones."""
    shown = [s for s in sources if s.get("drop")]
    if not shown:
        return None
    real = [s for s in shown if not s.get("control")]
    traces = [
        drop_trace(s, GREY if s.get("control") else COLOURS[real.index(s) % len(COLOURS)]) for s in shown
    ]
    ks = sorted({k for s in shown for k in s["drop"]["k"]})
    xaxis = axis(
        "Tokens removed, those with the highest scores first", type="log" if min(ks) > 0 else "linear"
    )
    xaxis |= {"tickvals": ks, "ticktext": [f"{k:,}" for k in ks]}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    yaxis = axis(f"Fall of the {metric}", zeroline=True, zerolinecolor="#bbbbb6")
    return {"data": traces, "layout": untitled(xaxis, yaxis, 36, showlegend=True, legend=legend, height=330)}


def drop_trace(source: Found, colour: str) -> Figure:
    drop, control = source["drop"], bool(source.get("control"))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plotted(visible(source["method"])),
        "x": drop["k"],
        "y": drop["mean"],
        "line": {"color": colour, "width": 1.6, "dash": "dash" if control else "solid"},
        "marker": {"size": 7, "color": colour},
        "error_y": whiskers(drop) | {"color": colour},
        "hovertemplate": "%{x} removed: %{y:.3g}",
    }


def whiskers(found: Found) -> Figure:
    """The ends of each point, none where they are not known."""
    rows = zip(found["mean"], found.get("low") or [], found.get("high") or [])
    ends = [(None if None in row else (row[0] - row[1], row[2] - row[0])) for row in rows]
    reach = {"array": [e and e[1] for e in ends], "arrayminus": [e and e[0] for e in ends]}
    return {**reach, "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "visible": bool(ends)}


# faithfulness


def faithfulness_figure(found: Found) -> Figure:
    """What a share of the heads and MLPs carries by itself: 0 is the corrupted run, 1 the clean one."""
    shares, low, high = found["share"], found.get("low"), found.get("high")
    traces = []
    if low and high and None not in [*low, *high]:
        edge = {"type": "scatter", "mode": "lines", "x": shares, "line": {"width": 0}, "hoverinfo": "skip"}
        traces = [edge | {"y": low}, edge | {"y": high, "fill": "tonexty", "fillcolor": faint(LINE)}]
    rows = [{"mean": m, **band(low, high, i)} for i, m in enumerate(found["mean"])]
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": shares,
            "y": found["mean"],
            "line": {"color": LINE, "width": 2},
            "marker": {"size": 6, "color": LINE},
            "hoverinfo": "text",
            "hovertext": [f"{percent(s)} of the edges<br>{with_interval(r)}" for s, r in zip(shares, rows)],
        }
    )
    log = min(shares) > 0 and max(shares) / min(shares) > 8
    ticks = [
        t
        for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
        if min(shares) <= t <= max(shares)
    ]
    scale = (
        {"type": "log", "tickvals": ticks, "ticktext": [percent(t) for t in ticks]}
        if log
        else {"tickformat": ".0%"}
    )
    yaxis = axis("Share of the effect it keeps")
    flat = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "line": {"color": "#aaaaaa", "width": 1, "dash": "dot"},
    }
    lines = [flat | {"y0": y, "y1": y} for y in (0, 1)]
    xaxis = axis("Share of the heads and MLPs that are kept", **scale)
    return {"data": traces, "layout": untitled(xaxis, yaxis, 30, shapes=lines, height=340)}


def band(low: Sequence[Any] | None, high: Sequence[Any] | None, i: int) -> Found:
    return {"low": low[i] if low else None, "high": high[i] if high else None}


def limit_text(effects: Found) -> str:
    """What the colours leave out."""
    top = limit(effects)
    beyond = [
        v for v in map(number, (effects.get("mlp") or {}).get("mean") or []) if v is not None and abs(v) > top
    ]
    if not beyond:
        return ""
    end, most = amounts(top, max(beyond, key=abs))
    return f"Colours end at {end}, the largest head; MLPs go up to {most}."
