"""What a report says turn by turn and place by place: numbers worked by hand, and both through compare."""

import json
import re
import warnings

import pytest
from tests.test_report import HOSTILE, one, printed

from regard import compare
from regard.report import Result, to_html, to_markdown
from regard.report.marks import marks
from regard.report.terminal import turn_tables
from regard.report.turns import by_place, by_turn, columns, figure, grouped, table_rows


def result() -> Result:
    rows = [
        one(task="turns", by_turn=[1.0, 0.5, 0.5], length=256),
        one(task="turns", by_turn=[1.0, 1.0, 0.5], length=512),
        one("snapkv", 0.25, task="turns", by_turn=[1.0, 0.25, 0.0], length=256),
        one("snapkv", 0.25, task="turns", by_turn=[0.5, 0.25], length=512),
        one(HOSTILE, 64, task="turns", by_turn=[0.0, 0.0, 1.0]),
        one("snapkv", 0.5, task="turns", status="timeout", by_turn=[1.0, 1.0, 1.0]),
        one(task="text", metric="nll", nll_by_place=[[0, 2.0], [32, 3.0], [64, 2.5]]),
        one("snapkv", 0.25, task="text", metric="nll", nll_by_place=[[0, 2.5], [32, 3.5], [64, 3.0]]),
        one(task="short", metric="nll", nll_by_place=[[0, 2.0], [8, 3.0]]),
        one(task="needle"),
    ]
    return Result({"model": "small"}, rows)


def test_turns_are_means_over_lengths_and_failed_cells_are_left_out():
    groups = grouped(result(), "by_turn")
    assert list(groups) == ["turns"]
    assert list(groups["turns"]) == [("full", ""), (HOSTILE, "64 tok"), ("snapkv", "25 %")]
    assert by_turn(groups["turns"]["full", ""]) == [(1, 1.0), (2, 0.75), (3, 0.5)]
    assert by_turn(groups["turns"]["snapkv", "25 %"]) == [(1, 0.75), (2, 0.25), (3, 0.0)]


def test_places_are_told_of_long_continuations_only():
    groups = grouped(result(), "nll_by_place")
    assert list(groups) == ["text"]
    assert by_place(groups["text"]["snapkv", "25 %"]) == [(0, 2.5), (32, 3.5), (64, 3.0)]
    rows = table_rows(result(), "nll_by_place")
    assert columns(rows) == ["task", "method", "budget", "from 0", "from 32", "from 64"]
    assert rows[1]["from 32"] == "3.50"


def test_every_report_says_them():
    shown = result()
    page, text = to_html(shown), to_markdown(shown)
    assert "<h2>Quality by turn</h2>" in page and "<h2>Likelihood by place</h2>" in page
    assert 'id="turns-0"' in page and 'id="places-0"' in page and 'id="turns-1"' not in page
    assert HOSTILE not in page and "<script" not in re.sub(r"\\<", "", text)
    assert "| turns | snapkv | 25 % | 75 % | 25 % | 0 % |" in text
    assert "| text | full |  | 2.00 | 3.00 | 2.50 |" in text
    said = printed(shown, 100)
    assert "Quality by turn" in said and "turn 3" in said and "Likelihood" not in said
    none = Result({}, [one(), one("a", 0.1)])
    for said in (to_html(none), to_markdown(none), printed(none, 100)):
        assert "Quality by turn" not in said and "Likelihood by place" not in said


def test_figures_are_valid_and_follow_the_budget():
    from plotly.graph_objects import Figure

    shown = result()
    marked = marks({r["label"]: r["method"] for r in shown.summary()}, "full")
    for key, task in (("by_turn", "turns"), ("nll_by_place", "text")):
        drawn = figure(shown, key, task, marked, ["25 %", "64 tok"])
        Figure(drawn)
        layout = drawn["layout"]
        heads = {
            "by_turn": ("Turn", "Share of right answers"),
            "nll_by_place": ("First token of the part", "Nats per token"),
        }
        assert (layout["xaxis"]["title"]["text"], layout["yaxis"]["title"]["text"]) == heads[key]
        budgets = {trace["name"]: trace["meta"]["budget"] for trace in drawn["data"]}
        assert budgets["full"] is None and budgets["snapkv @ 25 %"] == 0
    turns = figure(shown, "by_turn", "turns", marked, ["25 %"])["data"]
    assert next(t for t in turns if t["name"] == "snapkv @ 25 %")["y"] == [75.0, 25.0, 0.0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    from regard import load_shipped

    folder = tmp_path_factory.mktemp("turns")
    settings = {"methods": ["snapkv"], "budgets": [0.5], "lengths": [200], "samples": 2, "out": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(load_shipped("lm"), tasks=["turns:questions=2", "perplexity:continuation=256"], **settings)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["method"], row["task"]): row for row in map(json.loads, lines)}, folder


def test_turns_go_through_compare(measured):
    rows, folder = measured
    for method in ("full", "snapkv"):
        row = rows[method, "turns:questions=2"]
        assert row["status"] == "ok", row["error"]
        assert len(row["by_turn"]) == 2 and sum(row["by_turn"]) / 2 == pytest.approx(row["quality"])
        assert all(sample["depth"] is None for sample in row["samples"])
    # one of so many codes by guessing
    assert rows["full", "turns:questions=2"]["quality"] > rows["full", "turns:questions=2"]["chance"] == 0.25
    assert "Quality by turn" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_long_continuation_goes_through_compare(measured):
    rows, folder = measured
    row = rows["full", "perplexity:continuation=256"]
    assert [at for at, _ in row["nll_by_place"]] == list(range(0, 256, 32))
    assert sum(v for _, v in row["nll_by_place"]) / 8 == pytest.approx(row["nll"], abs=1e-3)
    assert rows["snapkv", "perplexity:continuation=256"]["nll"] > row["nll"]
    assert "Likelihood by place" in (folder / "report.md").read_text(encoding="utf-8")


def test_in_the_terminal_methods_stand_left_and_numbers_right():
    sides = {}
    for table in turn_tables(result(), 120):
        for column in table.columns:
            at = {getattr(cell, "justify", None) == "right" for cell in column.cells}
            sides[str(column.header)] = sides.get(str(column.header), set()) | at
    assert sides.pop("method") == {False}
    assert [*sides.values()] == [{True}] * 4
