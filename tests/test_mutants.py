"""The kept list of planted faults (tests/mutants) fits the files that it changes, and its runner tells what it sees."""

import queue
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts" / "mutants"))

import kept  # noqa: E402
import sampled  # noqa: E402
import trees  # noqa: E402
from reach import Reach, digest  # noqa: E402
from trees import LATE, SEEN, UNSEEN, Mutant  # noqa: E402

FAULTS = kept.load()


def test_every_fault_still_fits_its_file_and_has_a_name_of_its_own():
    assert len(FAULTS) > 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        fault.text()


def test_every_law_is_there():
    for fault in FAULTS:
        for law in fault.law:
            file, _, name = law.partition("::")
            text = (HERE.parent / file).read_text()
            assert not name or re.search(rf"\b{re.escape(name.partition('[')[0])}\b", text), law


def test_a_fault_has_a_law_or_a_reason_and_changes_something():
    with pytest.raises(ValueError, match="a law that sees it, or a reason"):
        kept.Fault("x", "src/regard/__init__.py", "a", "b")
    with pytest.raises(ValueError, match="a law that sees it, or a reason"):
        kept.Fault("x", "src/regard/__init__.py", "a", "b", ("tests/test_x.py",), "nothing reads it")
    with pytest.raises(ValueError, match="changes something"):
        kept.Fault("x", "src/regard/__init__.py", "a", "a", ("tests/test_x.py",))
    with pytest.raises(ValueError, match="once in its file, not 0 times"):
        kept.Fault("x", "src/regard/__init__.py", "no such text", "b", ("tests/test_x.py",)).text()


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import time\n\n\ndef test_right():\n    assert 1 + 1 == 2\n\n\ndef test_wrong():\n    assert 1 + 1 == 3\n\n\n"
        "def test_endless():\n    while True:\n        time.sleep(0.1)\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_what_a_run_says(tree):
    assert trees.tested(tree, ["tests/test_one.py::test_right"], 60) == (UNSEEN, "")
    outcome, by = trees.tested(tree, ["tests/test_one.py::test_right", "tests/test_one.py::test_wrong"], 60)
    assert outcome == SEEN and "test_wrong" in by
    assert trees.tested(tree, ["tests/test_one.py::test_endless"], 4) == (LATE, "")
    with pytest.raises(RuntimeError, match="pytest could not run"):
        trees.tested(tree, ["tests/test_none.py"], 60)


def test_a_mutant_whose_tests_cannot_run_is_a_row(tree, monkeypatch):
    monkeypatch.setattr(trees, "ROOT", tree)
    free, file = queue.Queue(), "tests/test_one.py"
    free.put(tree)
    before = (tree / file).read_text()
    row = trees.judged(
        Mutant("x", file, before.replace("wrong", "other"), (f"{file}::test_wrong",)), free, 60
    )
    assert row["outcome"] == "broken"
    assert (tree / file).read_text() == before and free.get() == tree


def test_which_tests_reach_a_line():
    file = "scripts/mutants/trees.py"
    lines = {file: {"3": [0, 1], "4": [1]}}
    found = Reach(["slow", "quick"], [9.0, 1.0], lines, {file: digest(HERE.parent / file)})
    assert found.of(file, 3) == [1, 0] and found.of(file, 4) == [1]
    assert found.of(file, 99) == [1, 0]  # no test runs it: those of its file
    assert found.of("src/other.py", 3) == []
    assert found.within([1, 0], 5) == ("quick",) and found.within([1, 0], 10) == ("quick", "slow")
    moved = Reach(["slow", "quick"], [9.0, 1.0], lines, {file: "another"})
    assert moved.of(file, 4) == [1, 0]  # lines have moved since


def test_types_and_decorators_are_not_mutated():
    source = "Number = int | float\n\n\n@f(1)\ndef g(x: int | None = 2) -> str | None:\n    return x | 3\n"
    skipped = sampled.types_and_decorators(source)
    inside = lambda line, column: any(low <= (line, column) < high for low, high in skipped)  # noqa: E731
    assert inside(1, 13) and inside(4, 3) and inside(5, 13) and inside(5, 34)
    assert not inside(5, 22) and not inside(6, 13)


def test_the_table_by_room():
    rows = [
        {"room": "ops", "outcome": SEEN},
        {"room": "ops", "outcome": UNSEEN},
        {"room": "bench", "outcome": LATE},
    ]
    lines = sampled.by_room(rows).splitlines()
    assert "| ops | 2 | 1 | 0 | 1 | 0 | 50 % |" in lines
    assert "| bench | 1 | 1 | 1 | 0 | 0 | 100 % |" in lines
    assert lines[-1] == "| all | 3 | 2 | 1 | 1 | 0 | 67 % |"


def test_the_key_is_of_the_change_and_its_tests():
    path = HERE.parent / "scripts/mutants/trees.py"
    text = path.read_text()
    one = Mutant("x", "scripts/mutants/trees.py", text.replace("NOTHING_RAN = 5", "NOTHING_RAN = 6"), ("a",))
    same = Mutant("x", "scripts/mutants/trees.py", one.text + "\n", ("a",))
    assert one.key == same.key != Mutant(one.name, one.file, one.text, ("b",)).key
    assert one.key != Mutant("x", one.file, text.replace("NOTHING_RAN = 5", "NOTHING_RAN = 7"), ("a",)).key
