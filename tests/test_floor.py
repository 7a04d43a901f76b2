"""A task that full attention cannot do ranks nothing, and every report says so."""

import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from regard.bench.cell import FULL, Cell
from regard.bench.compare import compare
from regard.bench.executor import InProcess
from regard.bench.measuring import Bench, measure
from regard.cli import app
from regard.models.shipped import load_shipped
from regard.report import show
from regard.report.floor import at_floor
from regard.report.html import to_html
from regard.report.markdown import to_markdown
from regard.report.result import Result


def row(method: str, task: str, quality: float, low: float | None = None, **more) -> dict:
    facts = {
        "kind": "cell",
        "label": method,
        "budget": None if method == FULL else 0.1,
        "length": 256,
        "seed": 0,
    }
    facts |= {
        "metric": "exact",
        "status": "ok",
        "error": "",
        "samples": [],
        "quality_low": low,
        "quality_high": 1.0,
    }
    facts |= dict.fromkeys(("bytes_full", "bytes_read", "bytes_read_full"), 100)
    facts |= {"bytes_held": 100 if method == FULL else 10, "decode_ratio": 1.0, "prefill_ratio": 1.0}
    facts |= {"method": method, "task": task, "quality": quality} | more
    return facts | {"key": f"{method} {task} {facts['length']} {facts['seed']}"}


def mixed() -> Result:
    """Needle can be done; recall cannot, and there `lucky` is three times full attention by chance."""
    rows = [row(FULL, "needle", 1.0, 1.0), row(FULL, "recall", 0.125, 0.0, chance=0.25)]
    rows += [row("lucky", "needle", 0.5, 0.2), row("lucky", "recall", 0.375, 0.1, chance=0.25)]
    rows += [row("sound", "needle", 1.0, 1.0), row("sound", "recall", 0.0, 0.0, chance=0.25)]
    return Result({"model": "small"}, rows)


def test_what_is_at_its_floor():
    def places(*rows: dict) -> list[tuple]:
        return [(cell["task"], cell["length"]) for cell in at_floor(rows)]

    assert places(row(FULL, "a", 0.5, 0.25, chance=0.25)) == [("a", 256)]  # its interval reaches a guess
    assert places(row(FULL, "a", 0.5, 0.26, chance=0.25)) == []
    assert places(row(FULL, "a", 0.125, 0.0)) == [
        ("a", 256)
    ]  # one of eight, and none by chance: noise all the same
    assert places(row(FULL, "a", 0.8)) == []
    assert places(row("h2o", "a", 0.0, 0.0)) == []  # a method that fails is no floor
    assert places(row(FULL, "a", 0.0, 0.0, status="failed")) == []


def test_seeds_are_taken_together():
    seeds = [row(FULL, "a", 0.5, 0.1, chance=0.25, seed=seed) for seed in range(4)]
    assert at_floor(seeds[:1])[0]["quality_low"] == pytest.approx(0.1)
    assert at_floor(seeds) == []  # 0.5 less 0.4 / 2 is above a quarter


def test_methods_are_ranked_by_the_other_tasks():
    result = mixed()
    by_name = {r["label"]: r for r in result.summary()}
    assert by_name["lucky"]["quality"] == 0.5 and by_name["sound"]["quality"] == 1.0
    assert by_name["lucky"]["tasks"] == {"needle": 0.5, "recall": None}
    assert all(r["complete"] for r in by_name.values())
    assert [r["label"] for r in result.keepers()] == ["sound"]
    said = result.sentence()
    assert said.startswith("sound @ 10 % is the cheapest") and "(task needle; length 256)" in said
    assert said.endswith(
        "Left out, as full attention is near what guessing gives there: recall at length 256."
    )


def test_where_every_task_is_at_its_floor_nothing_is_said_of_methods():
    rows = [r for r in mixed().rows if r["task"] == "recall"]
    result = Result({"model": "small"}, rows)
    assert "near what guessing gives everywhere" in result.sentence()
    assert result.winner() is None and result.pareto("held") == []


def test_every_report_says_so():
    result, note = (
        mixed(),
        "is near what guessing gives on recall at length 256 (12 %, its interval down to 0 %, by guessing 25 %)",
    )
    console = Console(width=200, file=io.StringIO())
    show(result, console)
    assert note in " ".join(console.file.getvalue().split())
    assert note in to_html(result)
    assert note.replace(" ", "") in to_markdown(result).replace("\\", "").replace(" ", "")


@pytest.fixture(scope="module")
def untrained():
    """The shipped model before its training."""
    model, tokenizer = load_shipped("lm")
    torch.manual_seed(0)
    return type(model)(model.config).eval(), tokenizer


def test_an_untrained_model_is_at_the_floor_of_every_task(untrained):
    bench = Bench(*untrained)
    rows = [
        measure(Cell(FULL, task, 256, samples=4), bench)
        for task in ("needle", "recall", "perplexity", "zoology_mqar")
    ]
    assert [r["chance"] for r in rows] == pytest.approx([0, 1 / 4, 1, 1 / 16], abs=0.02)
    assert {cell["task"] for cell in at_floor(rows)} == {r["task"] for r in rows}


def test_the_shipped_model_is_above_the_floor_of_every_task():
    bench = Bench(*load_shipped("lm"))
    rows = [measure(Cell(FULL, task, 256, samples=8), bench) for task in ("needle", "recall", "perplexity")]
    assert at_floor(rows) == []
    assert min(r["quality"] for r in rows) >= 0.9
    assert rows[2]["chance"] < 0.05  # its perplexity is far below the size of its vocabulary


def test_compare_says_it_of_a_real_run(untrained, tmp_path):
    result = compare(
        untrained,
        ["streaming_llm"],
        ["needle"],
        [64],
        [0.5],
        out=tmp_path / "run",
        samples=2,
        executor=InProcess(),
    )
    assert "near what guessing gives everywhere" in result.sentence()
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [r["status"] for r in rows if r["kind"] == "cell"] == ["ok", "floor"] and rows[0]["chance"] == 0.0
    assert result.failed() == [] and [r["method"] for r in result.rows] == ["full"]
    assert (
        "is near what guessing gives on needle at length 64" in (tmp_path / "run" / "report.html").read_text()
    )


def test_the_command_says_it_in_json(monkeypatch, tmp_path):
    monkeypatch.setattr("regard.bench.compare.compare", lambda *args, **options: mixed())
    result = CliRunner().invoke(app, ["compare", "--json", "--out", str(tmp_path / "run")])
    said = json.loads(result.stdout)
    assert said["at_floor"] == [
        {"task": "recall", "length": 256, "quality": 0.125, "quality_low": 0.0, "chance": 0.25}
    ]


def test_cells_at_the_floor_are_measured_where_that_is_asked(untrained, tmp_path):
    made = partial(compare, untrained, ["streaming_llm"], ["needle"], [64], [0.5], samples=2, timing=False)
    result = made(out=tmp_path / "run", at_floor=True, executor=InProcess())
    assert [r["status"] for r in result.rows] == ["ok", "ok"] and len(result.at_floor()) == 1
