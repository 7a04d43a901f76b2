"""The speed benchmarks: what their rows say, on a model small enough to time in a moment."""

import json

import pytest
import torch
from typer.testing import CliRunner

from regard.bench import operators
from regard.cli import app

SMALL = operators.Shape(context=256, layers=2, heads=2, width=16, prompt=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(operators, "QUICK", SMALL)
    monkeypatch.setattr(operators, "read_bandwidth", lambda: 1e10)


def test_decode_rows():
    rows = operators.bench("decode", quick=True)
    assert [r["case"].split(",")[0] for r in rows] == [
        "streaming_llm", "tidaldecode", "tokenselect", "tokenselect", "bytes held",
        "streaming_llm", "tidaldecode", "tokenselect", "tokenselect",
    ]  # fmt: skip
    assert all("bfloat16" in r["case"] for r in rows[:4]) and all("float32" in r["case"] for r in rows[5:])
    for row in [*rows[:4], *rows[5:]]:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert row["of_bound"] > 0
        assert {"case", "ratio", "of_bound", "spread", "target", "holds"} <= set(row)
    assert rows[4]["ratio"] > 1


def test_what_a_step_reads_is_what_the_budget_says():
    model, cache, facts = SMALL.model(), SMALL.ledger(), {}
    method = operators.catalog.method("streaming_llm", sinks=4, window=28)
    with torch.inference_mode():
        operators.step(model, cache, method, facts)
        operators.step(model, cache, method, facts)
    slot = 2 * 2 * 16 * 2 * 2  # keys and values, heads, width, bytes, layers
    assert facts["read"] == 33 * slot  # 32 stored and the new one
    full = {}
    with torch.inference_mode():
        operators.step(model, SMALL.ledger(), None, full)
    assert full["read"] == 257 * slot


def test_attach_rows():
    rows = operators.bench("attach", quick=True)
    assert len(rows) == 4
    assert all(r["of_bound"] is None and r["ratio"] > 0 for r in rows)


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < operators.read_bandwidth() < 1e13


def test_the_command():
    run = CliRunner().invoke(app, ["bench", "attach", "--quick", "--json"])
    assert len(json.loads(run.stdout)) == 4
    with pytest.raises(KeyError, match="near names: decode"):
        operators.bench("decod")
