"""A comparison that is killed at any of its writes goes on to the rows and reports of one that was not."""

import json

import pytest
from tests.kills import Kill, goes_on, killed, writes

from regard.bench.compare import compare
from regard.models.shipped import load_shipped
from regard.report import Result


class Said:
    """An executor whose cells have ended before: their rows are made up, and counted."""

    def __init__(self) -> None:
        self.asked = 0

    def run(self, cells, load):
        for cell in cells:
            self.asked += 1
            samples = [{"depth": 0.5, "score": 1.0, "answer": "a", "generated": "one\u2028two"}]
            numbers = dict.fromkeys(("bytes_held", "bytes_full", "bytes_read", "bytes_read_full"), 100)
            yield cell.row(quality=1.0, quality_low=1.0, quality_high=1.0, samples=samples, **numbers)


@pytest.fixture(scope="module")
def model():
    return load_shipped("lm")


def again(model, out) -> int:
    """How many cells a start asked for."""
    said = Said()
    asked = dict(out=out, samples=1, timing=False, executor=said)
    compare(model, ["snapkv", "h2o"], ["needle"], [96], [0.5], **asked)
    return said.asked


def test_a_comparison_killed_at_any_write_ends_as_if_it_had_not_been(model, tmp_path):
    seen = writes(lambda: again(model, tmp_path / "whole"))
    assert seen.count("fsync") == 3 and seen[:2] == ["write_text", "replace"] and len(seen) >= 9
    whole = Result.load(tmp_path / "whole")
    for at, what in enumerate(seen):
        out = tmp_path / f"{at}"
        assert killed(Kill(at), lambda out=out: again(model, out)) == 9
        rows = seen[: at + 1].count("fsync") - (what == "fsync")  # those that were whole
        where = f"killed at write {at}, {what}"
        assert goes_on(lambda out=out: again(model, out), where) == 3 - rows, where
        found = Result.load(out)
        assert found.rows == whole.rows and found.unreadable == []
        assert {p.name for p in out.iterdir()} == {"run.json", "results.jsonl", "report.html", "report.md"}
        assert (out / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()
        assert json.loads((out / "run.json").read_text())["cells"] == [r["key"] for r in whole.rows]
        assert again(model, out) == 0
