"""What a comparison is asked beside its grid: a dry run, a quick look, system prompts, positions, other samples."""

import json
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from regard.bench import measuring as cells
from regard.bench.asked import grid
from regard.bench.cell import FULL, Cell
from regard.bench.compare import compare, refuse_beyond
from regard.bench.executor import InProcess
from regard.bench.forecast import METHODS, Probe, forecast, seconds
from regard.bench.measuring import Bench
from regard.bench.spoken import Spoken
from regard.cli import app
from regard.cli import console as consoles
from regard.models.shipped import load_shipped
from regard.testing.tokenizers import ChatTokenizer, WordTokenizer

SMALL = ["compare", "--methods", "knorm", "--tasks", "needle", "--lengths", "96", "--budgets", "0.5"]


@pytest.fixture(scope="module")
def shipped():
    return load_shipped("lm")


def asked(shipped, out, methods="knorm", **options):
    given = dict(tasks="needle", lengths=96, budgets=0.5, samples=2, timing=False, executor=InProcess())
    return compare(shipped, methods, out=out, **{**given, **options})


# A dry run


def test_a_dry_run_measures_and_leaves_nothing(tmp_path):
    said = CliRunner().invoke(app, [*SMALL, "--dry-run", "--json", "--out", str(tmp_path / "run")])
    facts = json.loads(said.stdout)
    assert (facts["cells"], facts["kept"]) == (4, 0) and facts["seconds"] > 0 and "memory" in facts
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_what_was_measured(shipped, tmp_path):
    asked(shipped, tmp_path / "run")
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    facts = compare(
        shipped,
        ["knorm", "h2o"],
        "needle",
        96,
        0.5,
        out=tmp_path / "run",
        samples=2,
        timing=False,
        dry_run=True,
    )
    assert (facts["cells"], facts["kept"], facts["workers"]) == (3, 2, 1)
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_seconds_are_those_of_prompts_and_steps():
    """Twice the tokens take four times as long: 3 samples of 400 tokens 16 s each, and 16 steps of 2 s."""
    found = Probe(((100, 1.0), (200, 4.0)), step=0.5, batched=2.0)
    assert found.prompt(400) == pytest.approx(16)
    assert seconds(Cell(FULL, "needle", 400, samples=3), found) == pytest.approx(3 * 16 + 16 * 2)
    assert seconds(Cell("h2o", "needle", 400, samples=3), found) == pytest.approx(METHODS * 80)
    # batches of 8,192 tokens: two of them, each with steps of its own
    assert seconds(Cell(FULL, "needle", 4096, samples=3), found) == pytest.approx(
        3 * found.prompt(4096) + 2 * 16 * 2
    )
    timing = Cell("h2o", "perplexity", 100, samples=1, what="timing")
    assert seconds(timing, found) == pytest.approx((1 + METHODS) * 2 * (1 + 16 * 0.5))
    assert Probe(((100, 1.0), (100, 1.0)), 1, 1).prompt(300) == 3


def test_cells_are_shared_by_workers(shipped):
    cells = grid(["knorm"], ["needle"], [64], [0.5], 2, 0, None, None, timing=False)
    one, two = (forecast(cells, cells, lambda: shipped, workers) for workers in (1, 4))
    assert (one["workers"], two["workers"]) == (1, 2) and forecast(cells, [], lambda: shipped, 4)[
        "seconds"
    ] == 0


# Other samples, other lengths


def test_another_number_of_samples_is_a_run_of_its_own_in_the_same_folder(shipped, tmp_path):
    first = asked(shipped, tmp_path / "run")
    other = asked(shipped, tmp_path / "run", ["knorm", "tova"], samples=3)
    assert [len(r["samples"]) for r in other.rows] == [3, 3, 3] and len(first.rows) == 2
    again = asked(shipped, tmp_path / "run")
    assert [r["key"] for r in again.rows] == [r["key"] for r in first.rows]
    assert (tmp_path / "run" / "results.jsonl").read_text().count("\n") == 5  # nothing was measured twice


def test_lengths_beyond_the_models_positions_are_refused(shipped, tmp_path):
    with pytest.raises(ValueError, match=r"within the model's positions.*length=2049, positions=2048"):
        asked(shipped, tmp_path / "run", lengths=[64, 2049])
    assert not (tmp_path / "run").exists()
    refuse_beyond([Cell(FULL, "needle", 2048)], shipped)
    refuse_beyond(
        [Cell(FULL, "needle", 4096)], (type("M", (), {"config": Endless(), "parameters": list})(), None)
    )


class Endless:
    """A configuration that names no positions."""

    def get_text_config(self):
        return self


# Prompts


def test_a_system_prompt_begins_every_conversation():
    tokenizer = ChatTokenizer()
    spoken, asks = Spoken(tokenizer, "be brief"), [{"role": "user", "content": "one"}]
    whole = [{"role": "system", "content": "be brief"}, *asks]
    assert spoken.apply_chat_template(
        asks, tokenize=False, add_generation_prompt=True
    ) == tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert (
        spoken.apply_chat_template(whole[::1], tokenize=False, add_generation_prompt=True).count("be brief")
        == 1
    )
    assert spoken.encode("one") == tokenizer.encode("one")
    with pytest.raises(ValueError, match="a tokenizer with a chat template"):
        Spoken(WordTokenizer(), "be brief")
    bench = Bench(None, tokenizer)
    plain, said = (
        bench.samples(Cell(FULL, "needle", 90, samples=1, chat=True, system=s)) for s in (None, "be brief")
    )
    assert "be brief" in tokenizer.decode(said[0].prompt) and "be brief" not in tokenizer.decode(
        plain[0].prompt
    )
    keys = {Cell(FULL, "needle", 90, system=s).key for s in (None, "be brief", "be kind")}
    assert len(keys) == 3


def test_the_report_says_how_questions_were_asked(shipped, tmp_path):
    assert asked(shipped, tmp_path / "run").run["prompts"] == "asked in: plain text"


# The command


def test_a_quick_look_fills_in_what_is_not_said(tmp_path):
    words = [
        "compare",
        "--methods",
        "knorm",
        "--quick",
        "--dry-run",
        "--json",
        "--out",
        str(tmp_path / "run"),
    ]
    cells = lambda *more: json.loads(CliRunner().invoke(app, [*words, *more]).stdout)["cells"]  # noqa: E731
    tasks = len(grid(["knorm"], None, [256], [0.25], 8, 0, None, None, timing=False))
    assert cells() == tasks and cells("--lengths", "64,96") == 2 * tasks and cells("--tasks", "needle") == 2


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    row = {"label": "h2o", "budget": 0.5, "task": "needle", "length": 96, "status": "ok", "error": ""}
    now = iter([0.0, 10.0, 40.0, 40.0, 50.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    said = []
    shown = consoles.watching(False)
    with shown as step:
        monkeypatch.setattr(shown, "say", said.append)
        step(None, 4, 10)
        step(row, 5, 10)
        step(row, 6, 10)  # two in 40 s: four more take 80 s
        step(row, 7, 10)
    assert said == ["6 of 10 done, about 80 s left"]


# What cells share


def test_a_calibration_has_its_seconds_whichever_cell_asked_first(monkeypatch):
    """A quality cell calibrates; the cell of times, which comes later, still says what that took."""
    monkeypatch.setattr(cells, "calibrate", lambda *asked, **more: time.sleep(0.05) or "calibrated")
    bench = Bench(SimpleNamespace(device="cpu"), None)
    cell = Cell("block_topk", "needle", 96, settings={"target": "mass:0.9"})
    assert bench.method_of(cell) == "calibrated"
    timing = Cell("block_topk", "perplexity", 96, settings={"target": "mass:0.9"}, what="timing")
    assert bench.calibration(timing) >= 0.05 and bench.method_of(timing) == "calibrated"


def test_the_floor_of_a_task_is_judged_once_for_all_methods(shipped, monkeypatch):
    asked, quality = [], cells.quality
    monkeypatch.setattr(cells, "quality", lambda *facts: asked.append(1) or quality(*facts))
    bench = Bench(*shipped)
    said = {bench.floor(Cell(name, "needle", 96, 0.5, samples=2)) for name in ("knorm", "h2o", "tova")}
    assert len(said) == 1 and len(asked) == 1
