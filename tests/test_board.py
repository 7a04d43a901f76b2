"""Several comparisons on one board, and a report that is drawn again."""

import json

import pytest
from tests.test_report import HOSTILE, one
from typer.testing import CliRunner

from regard.cli import app
from regard.report import Result
from regard.report.board import board_markdown, board_page, board_rows, board_sentence, merged


def run_on(model, quality, key=""):
    rows = [one(), one("a", 0.5, quality=quality, bytes_held=50), one("b", 0.5, quality=0.5, bytes_held=40)]
    return Result({"model": model}, [{**row, "key": row["key"] + key} for row in rows])


def test_a_board_has_a_column_for_each_model():
    runs = merged([run_on("one", 0.96), run_on("two", 1.0)])
    a = next(r for r in board_rows(runs) if r["label"] == "a")
    assert a["mean"] == pytest.approx(0.98) and {m: r["quality"] for m, r in a["by"].items()} == {
        "one": 0.96,
        "two": 1.0,
    }
    assert board_sentence(runs) == "95 % of full attention on every model: a @ 50 %."
    assert "| a | 50 % | 98 % | 96 % | 50 % | 100 % | 50 % |" in board_markdown(runs)
    page = board_page(runs)
    assert page.count("<th data-sort") == 3 + 2 * 3 and "one" in page and len(page) < 4_000_000


def test_runs_on_one_model_are_one_column():
    other = Result({"model": "one"}, [one(task="copy"), one("a", 0.5, "copy", quality=0.5)])
    runs = merged([run_on("one", 1.0), other])
    assert list(runs) == ["one"] and runs["one"].tasks() == ["copy", "needle"]
    assert next(r for r in board_rows(runs) if r["label"] == "a")["mean"] == pytest.approx(0.75)


def test_a_board_writes_no_raw_text():
    page = board_page(merged([run_on(HOSTILE, 1.0)]))
    assert HOSTILE not in page


def written(folder, result):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({**result.run, "settings": {}}))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.rows))
    return str(folder)


def test_commands(tmp_path):
    run = CliRunner().invoke
    first, second = written(tmp_path / "1", run_on("one", 0.96)), written(tmp_path / "2", run_on("two", 1.0))
    page = tmp_path / "board.html"
    said = run(app, ["board", first, second, "--out", str(page), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["models"] == ["one", "two"]
    assert page.exists() and page.with_suffix(".md").exists()
    assert run(app, ["report", first]).exit_code == 0 and (tmp_path / "1" / "report.html").exists()
    assert json.loads(run(app, ["report", first, "--json"]).stdout)["sentence"].startswith("a @ 50 %")
    assert "holds a comparison's results.jsonl" in str(run(app, ["report", str(tmp_path)]).exception)
    assert "names an .html file" in str(run(app, ["board", first, "--out", "x.md"]).exception)


def test_a_stopped_run_is_drawn(tmp_path):
    """The last line is half a row: the others are in the report."""
    folder = tmp_path / "run"
    written(folder, run_on("one", 1.0))
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"kind": "cell", "key": "x"')
    result = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert result.exit_code == 0 and len(json.loads(result.stdout)["summary"]) == 3
