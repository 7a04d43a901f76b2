"""The benchmark of the linear family: what its rows say, at sizes that take a moment."""

import math

import pytest
import torch

from regard import catalog
from regard.bench import mechanisms, timing

SMALL = mechanisms.Sizes(64, 128, 256, 64, 64, (10, 100), 2, 16, 1)
KEYS = {"case", "ratio", "spread", "ms", "baseline_ms", "of_bound", "target", "holds", "note"}


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(mechanisms, "product_rate", lambda dtype: 1e11)
    monkeypatch.setattr(mechanisms, "copy_bandwidth", lambda: 1e10)


def rows_of(part) -> list[dict]:
    with torch.no_grad():
        return list(part(SMALL, lambda text: None))


@pytest.mark.parametrize(
    "name", ["forward", "longest", "trained_operator", "share", "flat", "memory", "decode"]
)
def test_rows(name):
    rows = rows_of(getattr(mechanisms, name))
    for dtype, row in zip(mechanisms.DTYPES, rows, strict=True):
        assert set(row) == KEYS
        assert dtype in row["case"]
        assert row["ratio"] > 0 or "not measured" in row["note"]
        assert row["holds"] is (row["ratio"] >= row["target"])


def test_a_row_holds_where_its_ratio_reaches_the_target_and_half_of_the_bound():
    def holds(ratio: float, bound: float | None = None) -> bool:
        return timing.row("a case", {"ratio": ratio, "ms": 10.0}, bound, target=2.0)["holds"]

    assert (holds(1.9), holds(2.0)) == (False, True)
    assert (holds(2.0, bound=0.004), holds(2.0, bound=0.005)) == (False, True)


def test_share_is_the_bound_over_the_time():
    for row in rows_of(mechanisms.share):
        operations = 2 * 128 * (4 * 16 * 16 + 2 * 64 * 16)
        assert row["baseline_ms"] >= 1e3 * operations / 1e11 * (1 - 1e-9)
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"])


def test_a_state_does_not_grow():
    short, long = (mechanisms.prefilled(SMALL, n, torch.float32, 32) for n in SMALL.steps)
    assert short.shape == long.shape == (1, 2, 16, 16)


def test_every_linear_mechanism_has_a_row(monkeypatch):
    names = ["linear_attention", "lightning_attention_2", "gla", "softmax"]
    monkeypatch.setattr(mechanisms.catalog, "list_methods", lambda **_: names)
    cases = [row["case"].split(",")[0] for row in rows_of(mechanisms.others)]
    assert cases == ["linear_attention", "gla"]


@pytest.mark.parametrize("part", [mechanisms.others, mechanisms.lower])
def test_a_page_that_raises_is_a_row_that_says_so(monkeypatch, part):
    page = catalog.get("gla")

    def broken(*_):
        raise ArithmeticError("no number")

    monkeypatch.setitem(vars(page), "fast", broken)
    monkeypatch.setattr(mechanisms.catalog, "list_methods", lambda **_: ["gla", "linear_attention"])
    wrong, right = rows_of(part)
    assert wrong["case"].startswith("gla,") and "ArithmeticError: no number" in wrong["note"]
    assert wrong["holds"] is False and math.isnan(wrong["ratio"])
    assert right["case"].startswith("linear_attention,") and right["ratio"] > 0
