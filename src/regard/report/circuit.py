"""The circuit as a drawing: layers from the bottom to the top, an edge for each thing that one part hands to another.

Drawn in Python as SVG with fixed sizes, so that it needs no script and scrolls in its own box on a narrow screen. The
parts of a layer are ordered by where their neighbours lie; an edge that would run behind a part it does not belong to
is bent around it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from regard.core.errors import present
from regard.report.explained_check import owner
from regard.report.explained_words import amounts, visible

Found = Mapping[str, Any]
Point = tuple[float, float]
WIDE, HIGH, APART, ROW, LEFT = 76, 26, 30, 84, 96
BEHIND = 100.0  # what it costs an edge to run behind a part, where 1 is to follow another edge for a square
CELL = 12  # the side of a square in which two edges run together
MOST, NUMBERED = 60, 14  # edges drawn, edges with their number beside them
COLOURS = {1: "#d55e00", -1: "#0072b2"}
FILLS = {"embedding": "#eef0f2", "head": "#ffffff", "mlp": "#f7efd9", "logits": "#e3eff8"}
PORTS = {"q": -20, "k": 0, "v": 20}


@dataclass(frozen=True)
class Edge:
    """One edge between nodes; `port` is what the receiver makes of it: query, key or value."""

    start: str
    end: str
    port: str
    score: float


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    row: str
    x: float
    y: float


def drawn_edges(graph: Found) -> list[Edge]:
    """The strongest edges, strongest first."""
    known = {node["id"] for node in graph["nodes"]}
    edges = []
    for edge in graph["edges"]:
        end = owner(edge["to"], known)
        port = edge["to"][len(end) + 1 :]
        edges.append(Edge(owner(edge["from"], known), end, port, float(edge["score"])))
    return sorted(edges, key=lambda e: -abs(e.score))[:MOST]


# where the parts stand


def level(node: Found) -> tuple[float, int]:
    """Rows from below: the embedding, then heads and MLP of each layer, the logits."""
    if node["kind"] == "embedding":
        return float("-inf"), 0
    if node["kind"] == "logits":
        return float("inf"), 0
    return float(node.get("layer") or 0), int(node["kind"] == "mlp")


def row_name(node: Found) -> str:
    if node["kind"] in ("embedding", "logits"):
        return ""
    return f"layer {node['layer']}" + (", MLP" if node["kind"] == "mlp" else "")


def rows(nodes: Sequence[Found], edges: Sequence[Edge]) -> list[list[Found]]:
    """The parts that have an edge, a list for each row from below, ordered so that edges cross little."""
    used = {name for e in edges for name in (e.start, e.end)}
    levels: dict[tuple[float, int], list[Found]] = {}
    for node in nodes:
        if node["id"] in used:
            levels.setdefault(level(node), []).append(node)
    out = [levels[key] for key in sorted(levels)]
    near: dict[str, list[str]] = {}
    for e in edges:
        near.setdefault(e.start, []).append(e.end)
        near.setdefault(e.end, []).append(e.start)
    for sweep in range(8):
        middle = {n["id"]: i - (len(row) - 1) / 2 for row in out for i, n in enumerate(row)}
        for row in out[:: -1 if sweep % 2 else 1]:
            row.sort(key=lambda n: sum(middle[m] for m in near[n["id"]]) / len(near[n["id"]]))
            middle |= {n["id"]: i - (len(row) - 1) / 2 for i, n in enumerate(row)}
    return out


def placed(levels: Sequence[Sequence[Found]]) -> dict[str, Node]:
    """Each part with its middle; the lowest row at y = 0, and rows in turn to the left and to the right.

    Were all rows centred, what passes them by would have to squeeze past every one.
    """
    widest = max(map(len, levels), default=1)
    out = {}
    for height, row in enumerate(levels):
        inner = 0 < height < len(levels) - 1
        shift = (-0.6, 0.0, 0.6, 0.0)[height % 4] * max(1, 3 - len(row)) if inner else 0.0
        for i, node in enumerate(row):
            x = (i + (widest - len(row)) / 2 + 0.5 + shift) * (WIDE + APART)
            out[node["id"]] = Node(node["id"], node["kind"], row_name(node), x, -ROW * height)
    return out


# edges


def curve(start: Point, end: Point, bend: float, steep: float = 0.45) -> list[Point]:
    """The four points of a Bézier curve that leaves upwards and arrives upwards."""
    reach = max(30.0, abs(start[1] - end[1]) * steep)
    return [start, (start[0] + bend, start[1] - reach), (end[0] + bend, end[1] + reach), end]


def at(points: Sequence[Point], t: float) -> Point:
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
    return tuple(sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in (0, 1))  # type: ignore


def hits(point: Point, boxes: Sequence[Point], wide: float, high: float) -> bool:
    return any(abs(point[0] - x) < wide and abs(point[1] - y) < high for x, y in boxes)


def routes(edges: Sequence[Edge], nodes: Mapping[str, Node]) -> list[list[Point]]:
    """A curve for each edge, the strongest first: behind no part, and where no other edge runs yet, if that can be."""
    taken: set[tuple[int, int]] = set()
    out = []
    for edge in edges:
        others = [(n.x, n.y) for n in nodes.values() if n.name not in (edge.start, edge.end)]
        best: tuple[float, list[Point]] | None = None
        for steep in (0.45, 0.15):  # those that turn aside at once only where the others are all in the way
            if best is None or best[0] >= BEHIND:
                costs = [(cost(points, others, taken), points) for points in candidates(edge, nodes, steep)]
                best = min([*costs, *([best] if best else [])], key=lambda found: found[0])
        out.append(present(best, "an edge has a curve")[1])
        taken |= squares(out[-1])
    return out


def candidates(edge: Edge, nodes: Mapping[str, Node], steep: float) -> list[list[Point]]:
    """From the straightest to the most bent."""
    a, b = nodes[edge.start], nodes[edge.end]
    start, end = (a.x, a.y - HIGH / 2), (b.x + PORTS.get(edge.port, 0), b.y + HIGH / 2)
    return [curve(start, end, side * 40.0 * i, steep) for i in range(11) for side in ((1, -1) if i else (1,))]


def squares(points: Sequence[Point]) -> set[tuple[int, int]]:
    """Where a curve runs, without its ends, which edges share."""
    places = [at(points, i / 40) for i in range(6, 35)]
    return {(round(x / CELL), round(y / CELL)) for x, y in places}


def cost(points: Sequence[Point], boxes: Sequence[Point], taken: set[tuple[int, int]]) -> float:
    """A part that is crossed is worst, then another edge that is followed, then a long way round."""
    behind = sum(hits(at(points, i / 48), boxes, WIDE / 2 + 6, HIGH / 2 + 6) for i in range(49))
    return BEHIND * behind + len(squares(points) & taken) + abs(points[1][0] - points[0][0]) / 60


def edge_svg(edge: Edge, points: Sequence[Point], top: float) -> str:
    width = 1 + 5 * abs(edge.score) / top
    dash = ' stroke-dasharray="7 4"' if edge.score < 0 else ""
    path = "M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}".format(*(v for p in points for v in p))
    port = f" ({PORT_NAMES.get(edge.port, visible(edge.port))})" if edge.port else ""
    said = f"{visible(edge.start)} to {visible(edge.end)}{port}: {amounts(edge.score, 0.1)[0]}"
    colour = COLOURS[1 if edge.score >= 0 else -1]
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.1f}" opacity="0.75"{dash}>'
        f"<title>{escape(said)}</title></path>"
    )


PORT_NAMES = {"q": "query", "k": "key", "v": "value"}


def numbers(edges: Sequence[Edge], curves: Sequence[Sequence[Point]], nodes: Mapping[str, Node]) -> str:
    """The scores of the strongest edges, each where it covers neither a part nor another number; else none."""
    taken, boxes, out = [], [(n.x, n.y) for n in nodes.values()], []
    for edge, points in list(zip(edges, curves, strict=True))[:NUMBERED]:
        for t in (0.5, 0.4, 0.6, 0.3, 0.7):
            x, y = at(points, t)
            if not hits((x, y), boxes, WIDE / 2 + 18, HIGH / 2 + 12) and not hits((x, y), taken, 36, 15):
                taken.append((x, y))
                out.append(
                    f'<text class="halo" x="{x:.0f}" y="{y + 4:.0f}">{amounts(edge.score, 0.1)[0]}</text>'
                )
                break
    return "".join(out)


# parts


def node_svg(node: Node, ports: Sequence[str]) -> str:
    """A box with its name, and under it the letters of the ports that edges reach."""
    name = visible(node.name)
    short = name if len(name) <= 9 else name[:8] + "…"
    round_, x, y = (13 if node.kind in ("embedding", "logits") else 4), node.x - WIDE / 2, node.y - HIGH / 2
    letters = "".join(
        f'<text class="halo port" x="{node.x + PORTS[p] - 7:.0f}" y="{node.y + HIGH / 2 + 11:.0f}">{p}</text>'
        for p in sorted(ports)
        if p in PORTS
    )
    return (
        f'<g><title>{escape(name)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{WIDE}" height="{HIGH}" rx="{round_}" '
        f'fill="{FILLS.get(node.kind, "#ffffff")}" stroke="#555b61"/>'
        f'<text x="{node.x:.0f}" y="{node.y + 4:.0f}">{escape(short)}</text>{letters}</g>'
    )


def circuit_svg(graph: Found) -> str:
    """The drawing; nothing where the graph has no edges."""
    edges = drawn_edges(graph)
    if not edges:
        return ""
    levels = rows(graph["nodes"], edges)
    nodes = placed(levels)
    curves = routes(edges, nodes)
    top = max(abs(e.score) for e in edges) or 1.0
    ports = {name: {e.port for e in edges if e.end == name} for name in nodes}
    lines = [edge_svg(e, c, top) for e, c in zip(edges, curves, strict=True)]
    names = {(n.row, n.y) for n in nodes.values()}
    xs = [at(c, i / 16)[0] for c in curves for i in range(17)] + [n.x for n in nodes.values()]
    left, right = min(xs) - WIDE / 2 - LEFT, max(xs) + WIDE / 2 + 12
    low, high = min(n.y for n in nodes.values()) - HIGH, HIGH + 6
    words = "".join(
        f'<text class="row" x="{left + 4:.0f}" y="{y + 4:.0f}">{escape(visible(name))}</text>'
        f'<path d="M{left + 4:.0f} {y + ROW / 2:.0f}H{right:.0f}" stroke="#efefea"/>'
        for name, y in sorted(names)
        if name
    )
    wide, tall = f"{right - left:.0f}", f"{high - low:.0f}"
    size = f'viewBox="{left:.0f} {low:.0f} {wide} {tall}" width="{wide}" height="{tall}"'
    said = "The circuit: parts of the model from the embedding at the bottom to the logits at the top"
    drawn = "".join(node_svg(n, sorted(ports[n.name])) for n in nodes.values())
    inside = f"{words}{''.join(lines)}{drawn}{numbers(edges, curves, nodes)}"
    return f'<svg class="circuit" {size} role="img" aria-label="{said}">{inside}</svg>'


def edge_table(graph: Found) -> str:
    """The drawn edges as a table."""
    body = "".join(
        f"<tr><td>{escape(visible(e.start))}</td><td>{escape(visible(e.end))}</td>"
        f'<td>{escape(PORT_NAMES.get(e.port, visible(e.port)))}</td><td class="n">{amounts(e.score, 0.1)[0]}</td></tr>'
        for e in drawn_edges(graph)
    )
    heads = '<th>From</th><th>To</th><th>As its</th><th class="n">Score</th>'
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
