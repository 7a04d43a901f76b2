"""check, support, bench efficiency and impl= from where a user types them."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.core import Unsupported
from regard.ops import backend

FAULTY = Path(__file__).parent / "faulty"


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def test_check_says_what_is_violated_and_ends_with_one():
    result = invoke("check", f"{FAULTY}/faults.py:no_causal_mask", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    row = next(r for r in report["rows"] if r["law"] == "causality")
    assert row["verdict"] == "violated" and row["counterexample"]["n"] == 2
    assert "violated:" in invoke("check", f"{FAULTY}/faults.py:no_causal_mask").stdout


def test_check_passes_a_sound_function():
    result = invoke("check", f"{FAULTY}/correct.py:softmax", "--against", "softmax")
    assert result.exit_code == 0 and "no law is violated" in result.stdout


def test_check_asked_wrongly_is_an_error_that_helps():
    assert "near names" in str(invoke("check", f"{FAULTY}/correct.py:softmx").exception)
    assert "gate" in str(invoke("check", f"{FAULTY}/faults.py:needs_a_gate").exception)


def test_support_is_a_matrix_of_all_mechanisms():
    result = invoke("support", "--json")
    assert result.exit_code == 0
    rows = {row["mechanism"]: row for row in json.loads(result.stdout)}
    assert rows["linear_attention"]["causal_cross"] == "yes"
    assert rows["gated_convolution"]["cross"].startswith("no: ")
    assert rows["arflow"]["causal_self"].startswith("leaks by design")


def test_efficiency_of_one_mechanism():
    result = invoke("bench", "efficiency", "--quick", "--methods", "vssd", "--json")
    rows = json.loads(result.stdout)
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    assert all(row["points"] for row in rows)


def test_a_named_implementation_is_never_replaced(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    wanted = regard.attend(q, k, v, "linear_attention").out
    torch.testing.assert_close(regard.attend(q, k, v, "linear_attention", impl="torch").out, wanted)
    with pytest.raises(Unsupported, match="no Triton kernel"):
        regard.attend(q, k, v, "softmax", impl="triton")
    monkeypatch.setattr(backend, "available", lambda: False)
    with pytest.raises(Unsupported, match="triton is not installed"):
        regard.attend(q, k, v, "linear_attention", impl="triton")
    monkeypatch.setattr(backend, "available", lambda: True)
    with pytest.raises(Unsupported, match="no Triton kernel"):
        regard.attend(q, k, v, "linear_attention", "cross", impl="triton")
