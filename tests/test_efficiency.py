"""Efficiency lengths: crossings of known curves are found, memory is what tensors hold, rows are whole."""

import json

import pytest
import torch

from regard.bench import efficiency as eff
from regard.bench.efficiency import Workload, bytes_held, crossing, efficiency, interval, shown, stop_reason


def point(n: int, ratio: float, spread: float = 0.01, held: int = 1, sdpa_held: int = 1) -> dict:
    near = {"low": ratio * (1 - spread), "high": ratio * (1 + spread)}
    return {
        "n": n,
        "ratio": ratio,
        **near,
        "ms": ratio * n**2,
        "sdpa_ms": n**2,
        "held": held,
        "sdpa_held": sdpa_held,
    }


def doublings(ratio) -> dict[int, dict]:
    return {n: point(n, ratio(n)) for n in (64, 128, 256, 512, 1024, 2048)}


def faster(p: dict) -> bool:
    return p["ratio"] < 1


@pytest.mark.parametrize("where", [100, 700, 1500])
def test_a_crossing_is_bracketed_to_an_eighth_of_a_doubling(where):
    points = doublings(lambda n: where / n)
    length = crossing(points, faster, lambda n: point(n, where / n))
    assert where < length <= where * 2 ** (1 / 8) + 1
    low, high = interval(points, length)
    assert low <= where <= high


def test_no_crossing_and_one_below_all():
    assert crossing(doublings(lambda n: 1.5), faster, None) is None
    assert crossing(doublings(lambda n: 0.5), faster, None) == 64
    assert interval(doublings(lambda n: 0.5), 64) == [None, 64]


def test_all_longer_lengths_must_be_below_too():
    ratio = {64: 0.9, 128: 0.8, 256: 1.2, 512: 0.9, 1024: 0.8, 2048: 0.7}
    length = crossing(doublings(ratio.get), faster, lambda n: point(n, 0.9))
    assert 256 < length <= 304


def test_a_noisy_crossing_has_a_wide_interval():
    points = {n: point(n, 700 / n, spread=0.5) for n in (64, 128, 256, 512, 1024, 2048)}
    assert interval(points, 1024) == [256, 2048]
    assert interval({n: point(n, 0.99, spread=0.1) for n in (64, 128)}, 64) == [None, None]


def test_what_would_be_slow_and_slower_than_sdpa_is_left_out():
    slow = {n: {"ms": 10.0 * n, "sdpa_ms": 1.0 * n, "held": 1e6} for n in (64, 128)}
    assert "256 tokens would take 2.6 s, SDPA 0.3 s" in stop_reason(slow, 128)
    assert stop_reason({n: {"ms": 1.0 * n, "sdpa_ms": 10.0 * n, "held": 1e6} for n in (64, 128)}, 128) == ""
    long = {n: {"ms": 20.0 * n, "sdpa_ms": 40.0 * n, "held": 1e6} for n in (64, 128)}
    assert "256 tokens would take 5.1 s, SDPA 10.2 s" in stop_reason(long, 128)
    assert "hold 8.0 GB" in stop_reason(
        {n: {"ms": 1.0, "sdpa_ms": 1.0, "held": 1e9 * n / 32} for n in (64, 128)}, 128
    )


def test_memory_is_the_peak_of_what_tensors_hold():
    def work() -> torch.Tensor:
        a = torch.ones(1000, 1000)  # 4 MB
        b = a + 1  # 8 MB
        del a
        return b * 2  # 8 MB

    assert bytes_held(work) == pytest.approx(8_000_000, abs=1000)


def test_explicit_weights_hold_their_square():
    workload = Workload("self", backward=False)
    assert workload.unfused(512) >= 2 * eff.HEADS * 512**2 * 4 > bytes_held(workload.sdpa(512))
    assert workload.unfused(512) is workload.unfused(512)


@pytest.mark.parametrize("pattern", ["causal_self", "cross"])
def test_rows_are_whole(pattern, monkeypatch):
    monkeypatch.setattr(eff, "REPEATS", 2)
    heard = []
    rows = efficiency(["linear_attention"], pattern, most=256, progress=heard.append)
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    assert len(heard) == 2
    for row in rows:
        assert {64, 128, 256} <= {p["n"] for p in row["points"]}
        assert row["most"] == 256
        assert all(p["held"] > 0 and p["low"] <= p["ratio"] <= p["high"] for p in row["points"])
        assert row["time"] is None or 64 <= row["time"] <= 256
    json.dumps(rows, allow_nan=False)
    assert set(shown(rows)[0]) == {"mechanism", "pass", "time", "memory", "memory, unfused", "faster", "note"}


def test_a_mechanism_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(eff, "lengths", lambda *_: 1 / 0)
    rows = efficiency(["softmax"], most=128)
    assert rows[0]["note"] == "failed: ZeroDivisionError: division by zero"
    assert shown(rows)[0]["time"] == "–"


def test_wrong_names():
    with pytest.raises(KeyError, match="near names: softmax"):
        efficiency(["softmx"])
    with pytest.raises(KeyError, match="near names: causal_self"):
        efficiency(pattern="causal")
    with pytest.raises(ValueError, match="mechanism that does self"):
        efficiency(["h2o"], "self")


def test_old_names_work_for_one_release(monkeypatch):
    with pytest.warns(DeprecationWarning, match="Workload"):
        assert eff.Bench is Workload
    monkeypatch.setattr(eff, "attempt", lambda *_: {})
    heard = []
    with pytest.warns(DeprecationWarning, match="progress="):
        efficiency(["softmax"], told=heard.append)
    assert len(heard) == 2
