"""Benchmarks end in time on any CPU, and say which CPU it was; compare and doctor say where one is slow."""

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from regard import catalog
from regard.bench import attached, caches, efficiency, grid, mechanisms, operators, sparse, timing
from regard.bench import compare as comparing
from regard.cli import app
from regard.models.doctor import doctor
from regard.models.shipped import load_shipped, stored_dtype
from regard.ops import machine

SMALL = operators.Shape(context=128, layers=2, heads=2, width=16, prompt=16)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def slow_cpu(monkeypatch):
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 0.02, torch.float16: 0.05})


def taking(clock, took: float, runs: list) -> float:
    clock[0] += took
    runs.append(took)
    return took


def test_repetitions_become_fewer_as_the_time_runs_out(clock):
    for limit, wanted in ((math.inf, 7), (1000.0, 7), (100.0, 6), (20.0, 1)):
        runs: list[float] = []
        with timing.within(limit):
            times = timing.paired(lambda: taking(clock, 1.0, runs), lambda: taking(clock, 2.0, []), 7)  # noqa: B023
        assert len(runs) == wanted + 1, limit
        assert times["ratio"] == 2.0


def test_a_case_without_time_is_a_row_that_says_so(clock):
    with timing.within(5.0):
        clock[0] = 5.0
        row = timing.row("a case", timing.paired(lambda: 1.0, lambda: 1.0), 1.0, 0.5, "of something")
        assert math.isnan(timing.typical(lambda: None, 3))
    assert math.isnan(row["ratio"]) and row["holds"] is False
    assert row["note"] == f"{timing.OUT}; of something"


def test_limits_nest_and_end(clock):
    assert timing.left() == math.inf
    with timing.within(10.0):
        with timing.within(100.0):
            assert timing.left() == 10.0
        with timing.within(3.0):
            clock[0] += 1
            assert timing.left() == 2.0
        assert timing.left() == 9.0
    assert timing.left() == math.inf


def test_no_case_is_cut_in_silence(monkeypatch):
    """Without any time every case of every benchmark is a row all the same."""
    monkeypatch.setattr(operators, "QUICK", SMALL)
    monkeypatch.setattr(operators, "read_bandwidth", lambda: 1e10)
    # what this machine multiplies and copies has no part in which rows there are
    monkeypatch.setattr(mechanisms, "product_rate", lambda dtype: 1e12)
    monkeypatch.setattr(mechanisms, "copy_bandwidth", lambda: 1e10)
    small = mechanisms.Sizes(64, 128, 256, 64, 64, (10, 100), 2, 16, 1)
    monkeypatch.setattr(mechanisms, "QUICK", small)
    monkeypatch.setattr(sparse, "QUICK", sparse.Sizes(256, 128, 512, 64, 32, 0.9, 2, 16, 1))
    monkeypatch.setattr(sparse, "sparse_pages", lambda: ["block_topk"])
    monkeypatch.setattr(sparse, "compiled", lambda sizes: iter(()))
    monkeypatch.setattr(attached, "QUICK", attached.Session(prompt=32, budget=16, steps=2, repeats=1))
    monkeypatch.setattr(grid, "QUICK", grid.Sizes(8, 14, (8, 16), (8, 16), 1, 8, 3, 1))
    few = [catalog.method("knorm", budget=8), catalog.method("adakv", budget=8)]
    monkeypatch.setattr(caches, "scoring", lambda sizes: few)
    monkeypatch.setattr(caches, "QUICK", caches.Sizes(16, 8, 64, 0.25, 1, 1))
    for name in ("decode", "caches", "grid", "mechanisms", "sparse", "attach"):
        with timing.within(0.0):
            cut = [row["case"] for row in operators.bench(name, quick=True)]
        whole = [*operators.bench(name, quick=True)]
        assert cut == [row["case"] for row in whole], name
        there = [row for row in whole if "is not installed" not in row.get("note", "")]
        assert all(row["spread"] >= 0 for row in there if row.get("spread") is not None), name


def test_a_mechanism_has_its_share_of_the_time():
    rows = efficiency.efficiency(["linear_attention"], most=1024, limit=0.0)
    assert [row["most"] for row in rows] == [efficiency.LEAST] * 2
    assert all("share of the benchmark's time" in row["note"] for row in rows)


def test_rows_and_title_name_the_cpu(monkeypatch, slow_cpu):
    monkeypatch.setattr(operators, "QUICK", SMALL)
    monkeypatch.setattr(attached, "rows", lambda quick, progress: [])
    run = CliRunner().invoke(app, ["bench", "attach", "--quick", "--json"])
    rows = json.loads(run.stdout)
    assert {row["cpu"] for row in rows} == {machine.cpu_name()}
    assert {row["multiplies_bf16"] for row in rows} == {False}
    table = CliRunner().invoke(app, ["bench", "attach", "--quick"], env={"COLUMNS": "200"}).stdout
    assert machine.cpu_name() in table and "bfloat16 not multiplied" in table


def test_a_model_that_is_timed_is_of_a_dtype_that_the_cpu_multiplies(monkeypatch, slow_cpu):
    shape = operators.Shape()
    here = operators.shape_here(shape, "attach")
    assert here.dtype == torch.float32 and here.cached == shape.cached
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 2.0})
    assert operators.shape_here(shape, "attach") == shape


def test_time_that_runs_out_while_a_cache_is_made(monkeypatch):
    ledger = operators.Shape.ledger

    def slow(shape):
        monkeypatch.setattr(timing, "left", lambda: 0.0)
        return ledger(shape)

    model = SMALL.model()
    monkeypatch.setattr(operators.Shape, "model", lambda shape: model)
    monkeypatch.setattr(operators, "left", lambda: 1.0)
    monkeypatch.setattr(operators.Shape, "ledger", slow)
    with torch.inference_mode():
        rows = operators.decode_in(SMALL, 1e10, lambda text: None)
    assert all(math.isnan(row["ratio"]) and timing.OUT in row["note"] for row in rows[:4])


def test_decode_needs_the_memory_that_it_says(monkeypatch):
    monkeypatch.setattr(operators, "free_here", lambda: SMALL.cached)
    rows = operators.decode_in(SMALL, 1e10, lambda text: None)
    assert len(rows) == len(operators.CASES) and all("are free" in row["note"] for row in rows)


def test_doctor_says_where_a_model_is_slow(monkeypatch, slow_cpu):
    model = load_shipped()[0]
    assert doctor(model).slow == ""
    low = model.bfloat16()
    report = doctor(low)
    assert "bfloat16 products run at 0.02 of float32's rate on this CPU" in str(report)
    assert report.to_dict()["slow"] == report.slow
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 2.0})
    assert doctor(low).slow == ""


@pytest.fixture
def stored_low(tmp_path):
    """A folder of the shipped model in bfloat16."""
    model, tokenizer = load_shipped()
    model.bfloat16().save_pretrained(tmp_path / "low")
    tokenizer.save_pretrained(tmp_path / "low")
    return str(tmp_path / "low")


@pytest.mark.usefixtures("measured_here")
def test_compare_says_so_and_loads_another_dtype(tmp_path, stored_low, slow_cpu):
    assert stored_dtype(stored_low) == torch.bfloat16 and stored_dtype("lm") == torch.float32
    asked = ["compare", "--model", stored_low, "--methods", "full", "--tasks", "recall", "--lengths", "64",
             "--samples", "1", "--workers", "1", "--device", "cpu"]  # fmt: skip
    low = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "low_run")])
    said = re.sub(r"\s+", " ", low.stderr)
    assert "0.02 of float32's rate on this CPU" in said and "--dtype float32" in said
    run = json.loads((tmp_path / "low_run" / "run.json").read_text())
    assert run["machine"]["cpu"] == machine.cpu_name() and run["machine"]["multiplies_bf16"] is False
    assert "0.02 of float32" in run["slow"]
    high = CliRunner().invoke(app, [*asked, "--dtype", "float32", "--out", str(tmp_path / "high_run")])
    assert "float32's rate" not in high.stderr
    assert json.loads((tmp_path / "high_run" / "run.json").read_text())["slow"] is None


def test_a_dtype_is_one_of_three_and_of_a_model_by_path(tmp_path, stored_low):
    with pytest.raises(ValueError, match=r"dtype is one of .*'float8'"):
        comparing.loader(stored_low, False, dtype="float8")
    with pytest.raises(ValueError, match="loaded by path"):
        comparing.loader(None, False, dtype="float32")
    _, opened = comparing.loader(stored_low, False, "cpu", "float32")
    assert opened()[0].dtype == torch.float32
    cells = comparing.grid(["full"], ["recall"], [64], None, 1, 0, None, None)
    one, other = (comparing.with_revisions(cells, stored_low, dtype)[0].key for dtype in (None, "float32"))
    assert one != other
