"""What the page of an explanation draws: figures, whiskers and the circuit, against the numbers they stand for."""

import random
import time

from tests.explained import fake

from regard.report.circuit import HIGH, WIDE, at, circuit_svg, drawn_edges, hits, placed, routes, rows
from regard.report.explanation import drawn
from regard.report.whiskers import span, whisker


def test_figures_are_valid_plotly_and_centred_at_zero():
    from plotly.graph_objects import Figure

    found = fake()
    figures = drawn(found)
    assert list(map(type, map(Figure, figures.values()))) == [Figure] * 3
    colours = figures["effects"]["layout"]["coloraxis"]
    assert colours["cmin"] == -colours["cmax"] == -0.41 and colours["colorscale"][2] == [0.5, "#ffffff"]
    heads, dots, mlp, _ = figures["effects"]["data"]
    assert heads["text"][3][2] == "<b>layer 3 head 2</b><br>0.41, 95 % 0.36 to 0.46<br>verified exactly"
    assert mlp["z"][0] == [0.9] and "<b>layer 0 MLP</b><br>0.90, 95 %" in mlp["text"][0][0]
    exact = {
        (str(j), str(i)) for i, row in enumerate(found["effects"]["exact"]) for j, e in enumerate(row) if e
    }
    assert set(zip(dots["x"], dots["y"], strict=True)) == exact


def test_whiskers_stand_where_their_numbers_are():
    row = {"mean": -0.5, "low": -1.0, "high": 0.25}
    svg = whisker(row, span([row, {"mean": 1.0}]))  # 192 pixels from -1 to 1, from the fourth on
    assert 'x="52.0" y="3.5" width="48.0"' in svg and "M100.0 0V18" in svg and "M4.0 9.0H124.0" in svg
    assert "#0072b2" in svg and "#0072b2" not in whisker(row | {"control": True}, (-1.0, 1.0))


def test_no_edge_runs_behind_a_part_that_is_not_its_own():
    graph = fake()["graph"]
    edges = drawn_edges(graph)
    nodes = placed(rows(graph["nodes"], edges))
    assert [e.score for e in edges] == sorted((e["score"] for e in graph["edges"]), key=abs, reverse=True)
    assert (
        nodes["embedding"].y > nodes["L0H1"].y > nodes["L0M"].y > nodes["L3H2"].y > nodes["logits"].y
    )  # y is down
    for edge, points in zip(edges, routes(edges, nodes), strict=True):
        others = [(n.x, n.y) for n in nodes.values() if n.name not in (edge.start, edge.end)]
        assert not any(hits(at(points, i / 100), others, WIDE / 2, HIGH / 2) for i in range(101)), edge


def test_a_large_circuit_is_quick():
    rng = random.Random(0)
    nodes = [{"id": f"L{i}H{j}", "layer": i, "kind": "head"} for i in range(30) for j in range(4)]
    pairs = [(a["id"], b["id"]) for a in nodes for b in nodes if a["layer"] < b["layer"]]
    edges = [
        {"from": a, "to": f"{b}.{rng.choice('qkv')}", "score": rng.gauss(0, 1)}
        for a, b in rng.sample(pairs, 500)
    ]
    start = time.process_time()
    drawn = circuit_svg({"nodes": nodes, "edges": edges})
    assert time.process_time() - start < 3
    assert drawn.count("<path") >= 60 and "nan" not in drawn
