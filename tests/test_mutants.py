"""The kept list of planted faults (tests/mutants) fits the files that it changes, and its runner tells what it sees."""

import importlib.util
import queue
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts" / "mutants"))

import kept  # noqa: E402
import reach  # noqa: E402
import sampled  # noqa: E402
import trees  # noqa: E402
from reach import Reach  # noqa: E402
from trees import BROKEN, LATE, SEEN, UNCOLLECTED, UNSEEN, Mutant  # noqa: E402

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


def test_what_a_run_says(tree, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    assert trees.tested(tree, ["tests/test_one.py::test_right"], 60) == (UNSEEN, "")
    outcome, by = trees.tested(tree, ["tests/test_one.py::test_right", "tests/test_one.py::test_wrong"], 60)
    assert outcome == SEEN and "test_wrong" in by
    assert trees.tested(tree, ["tests/test_one.py::test_endless"], 4) == (LATE, "")
    with pytest.raises(RuntimeError, match="pytest could not run"):
        trees.tested(tree, ["tests/test_none.py"], 60)


def test_a_law_that_fails_without_a_fault_is_named(tree, monkeypatch):
    """Also one whose name has blanks."""
    monkeypatch.setattr(trees, "ROOT", tree)
    (tree / "tests" / "test_two.py").write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('x', ['of one', 'of two'])\n"
        "def test_x(x):\n    assert x == 'of one'\n"
    )
    right, wrong = (f"tests/test_one.py::test_{name}" for name in ("right", "wrong"))
    blank, good = (f"tests/test_two.py::test_x[of {n}]" for n in ("two", "one"))
    mutants = [trees.Mutant(law, "tests/test_one.py", "", (law,)) for law in (right, wrong, blank, good)]
    failing = kept.failing_laws(mutants, 60, 2)
    assert {*failing} == {wrong, blank} and "1 + 1" in failing[wrong]
    missing = trees.Mutant("none", "tests/test_one.py", "", ("tests/test_one.py::test_none",))
    with pytest.raises(SystemExit, match="could not be asked"):
        kept.failing_laws([missing], 60, 1)


def test_a_line_of_what_failed_is_of_a_law():
    """Which is a test, or all of a function, class or file, and no other with a longer name."""
    law = "tests/test_one.py::test_wrong"
    for name in (law, law + "[of two]", law + " - assert False", law + "[of two] - assert False"):
        assert kept.of(law, f"FAILED {name}") and kept.of("tests/test_one.py", f"FAILED {name}")
    assert not kept.of(law, f"FAILED {law}_too - assert False")


def test_what_runs_tests_ends_with_who_waits_for_it(tree):
    """Killed in the middle of a test that never ends."""
    (tree / "tests" / "test_one.py").write_text(
        "import os\nimport time\n\n\ndef test_endless():\n    open('pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    code = f"import sys\nsys.path.insert(0, {str(Path(trees.__file__).parent)!r})\nimport pathlib, trees\n"
    code += f"if __name__ == '__main__':\n    trees.tested(pathlib.Path({str(tree)!r}), ['tests/test_one.py'], 600)\n"
    (tree / "waits.py").write_text(code)
    waits = subprocess.Popen([sys.executable, str(tree / "waits.py")])
    pid = tree / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    waits.kill()
    waits.wait()
    wait_until(lambda: not Path(f"/proc/{pid.read_text()}/cwd").exists())


def wait_until(done, seconds: float = 180.0):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_mutant_whose_tests_cannot_run_is_a_row(tree, monkeypatch):
    monkeypatch.setattr(trees, "ROOT", tree)
    free, file = queue.Queue(), "tests/test_one.py"
    free.put(tree)
    before = (tree / file).read_text()
    row = trees.judged(
        Mutant("x", file, before.replace("wrong", "other"), (f"{file}::test_wrong",)), free, 60
    )
    assert row["outcome"] == "uncollected"
    assert (tree / file).read_text() == before and free.get() == tree


def test_what_could_not_be_run_is_asked_once_more(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("mutants", HERE.parent / "scripts/mutants/__main__.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    path = "scripts/mutants/trees.py"
    one, two = (
        Mutant(name, path, (HERE.parent / path).read_text().replace("BROKE = 70", f"BROKE = {name}"))
        for name in "12"
    )
    asked, says = [], iter((BROKEN, UNSEEN, SEEN, BROKEN, BROKEN))

    def outcomes(mutants, *_):
        asked.append([m.name for m in mutants])
        return [(m, {"key": m.key, "outcome": next(says), "seconds": 1.0}) for m in mutants]

    monkeypatch.setattr(main, "outcomes", outcomes)
    args, out = SimpleNamespace(again=False, workers=2, limit=1.0), tmp_path / "rows.jsonl"
    assert [row["outcome"] for row in main.run([one, two], out, args)] == [SEEN, UNSEEN]
    assert asked == [["1", "2"], ["1"]]
    # a line of each run, the last of which is read
    assert len(out.read_text().splitlines()) == 3 and [r["outcome"] for r in main.read(out)] == [SEEN, UNSEEN]
    assert [row["outcome"] for row in main.run([one], tmp_path / "more.jsonl", args)] == [BROKEN]
    capsys.readouterr()


SOURCE = '''
def one(x=1):
    """Says."""
    if x > 2:
        return [
            y + 1 for y in range(x)
        ]
    elif x == 1:
        x += 1
    return x


class Two:
    width = 3

    def three(self):
        return self.width


TABLE = {"a": 1}
'''


def test_a_marked_place_says_that_it_ran(tmp_path, monkeypatch):
    lines = SOURCE.splitlines()
    at = {
        word: n
        for n, line in enumerate(lines, 1)
        for word in ("x=1", "y + 1", "elif", "x += 1", "width = 3")
        if word in line
    }
    names = [*at]
    source = reach.marked(SOURCE, [(at[word], n) for n, word in enumerate(names)])
    heard: list[str] = []
    monkeypatch.setitem(sys.modules, "says_what_ran", SimpleNamespace(ran=lambda n: heard.append(names[n])))
    space: dict = {}
    exec(source, space)
    assert heard == [] and space["one"].__doc__ == "Says."
    assert space["one"](3) == [1, 2, 3] and heard == ["x=1", "width = 3", "y + 1"]
    heard.clear()
    assert space["one"]() == 2 and heard == ["x=1", "width = 3", "elif", "x += 1"]
    heard.clear()
    assert space["Two"]().three() == 3 and heard == [
        "width = 3"
    ]  # of a class or a module: all functions of the file


def test_a_marked_place_stands_in_one_graph_and_says_that_it_was_traced(tmp_path, monkeypatch):
    (tmp_path / "says_what_ran.py").write_text(reach.SAYS)
    (tmp_path / "told").mkdir()
    (tmp_path / "marked_here.py").write_text(reach.marked("def add(x):\n    return x + 1\n", [(2, 7)]))
    monkeypatch.setenv(reach.TELLS, str(tmp_path / "told"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("says_what_ran", "marked_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    add = importlib.import_module("marked_here").add
    assert torch.compile(add, backend="eager", fullgraph=True)(torch.ones(2)).tolist() == [2, 2]
    (heard,) = (path.read_text() for path in (tmp_path / "told").iterdir())
    assert heard.startswith("7 tests/test_mutants.py::test_a_marked_place_stands_in_one_graph")


def test_who_ran_a_place(tmp_path):
    (tmp_path / "11").write_text(
        "0 tests/test_a.py::test_x (setup)\n1 tests/test_a.py::test_x[a@b] (call)\n2  \n"
    )
    (tmp_path / "12").write_text("1 tests/test_b.py::test_z (call)\n1 tests/test_b.py::test_gone (call)\n")
    tests = {"tests/test_a.py::test_x", "tests/test_a.py::test_x[a@b]", "tests/test_b.py::test_z"}
    assert reach.runs(tmp_path, tests) == {
        0: {
            "tests/test_a.py::test_x",
            "tests/test_a.py::test_x[a@b]",
        },  # what one sets up, others of its file use
        1: {"tests/test_a.py::test_x[a@b]", "tests/test_b.py::test_z"},
    }


def test_which_tests_a_mutant_is_given():
    mutant = Mutant("3: a -> b", "src/x.py", "")
    found = Reach(["slow", "quick"], [9.0, 1.0], {"src/x.py:3: a -> b": [0, 1]}, reach.digest())
    assert found.within(mutant, 5) == ("quick",) and found.within(mutant, 10) == ("quick", "slow")
    assert found.fits([mutant]) and not found.fits([mutant, Mutant("4: a -> b", "src/x.py", "")])
    assert found.fits([])  # fewer places than were asked for


def test_the_suite_is_asked_once_who_runs_a_place(tree, monkeypatch, tmp_path):
    """A tree of its own with a test of a process that it starts; the next time it is read from a file."""
    (tree / "src").mkdir()
    (tree / "src" / "added.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef other():\n    return 1\n"
    )
    (tree / "tests" / "test_one.py").write_text(
        "import subprocess\nimport sys\nfrom added import add\n\n\ndef test_adds():\n    assert add(1, 2) == 3\n\n\n"
        "def test_below():\n    below = [sys.executable, '-c', 'import added; added.add(1, 2)']\n"
        "    assert subprocess.run(below).returncode == 0\n\n\n"
        "def test_nothing():\n    pass\n"
    )
    monkeypatch.setattr(trees, "ROOT", tree)
    mutants = [
        Mutant("2: return a + b -> return a - b", "src/added.py", ""),
        Mutant("6: return 1 -> return 2", "src/added.py", ""),
    ]
    found = reach.known(tmp_path / "reach.json", mutants, 1)
    assert {*found.within(mutants[0], 60)} == {
        "tests/test_one.py::test_adds",
        "tests/test_one.py::test_below",
    }
    assert found.within(mutants[1], 60) == ()
    asked: list[int] = []
    monkeypatch.setattr(reach, "measured", lambda mutants, workers: asked.append(1) or found)
    assert reach.known(tmp_path / "reach.json", mutants, 1) == found and not asked
    (tree / "tests" / "test_more.py").write_text("def test_more():\n    pass\n")
    reach.known(tmp_path / "reach.json", mutants, 1)
    assert asked  # a law was written: it may run what no test ran before


def test_a_mutant_can_be_imported():
    assert sampled.compiles("x = 1\n") and not sampled.compiles(None)
    assert not sampled.compiles("def f(a, &, b): pass") and not sampled.compiles("y = x is not 'image'")


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
        {"room": "bench", "outcome": UNCOLLECTED},
    ]
    lines = sampled.by_room(rows).splitlines()
    assert "| ops | 2 | 1 | 0 | 1 | 0 | 50 % |" in lines
    assert "| bench | 2 | 2 | 1 | 0 | 0 | 100 % |" in lines
    assert lines[-1] == "| all | 4 | 3 | 1 | 1 | 0 | 75 % |"


def test_the_key_is_of_the_change_and_its_tests():
    path = HERE.parent / "scripts/mutants/trees.py"
    text = path.read_text()
    one = Mutant("x", "scripts/mutants/trees.py", text.replace("BROKE = 70", "BROKE = 71"), ("a",))
    same = Mutant("x", "scripts/mutants/trees.py", one.text + "\n", ("a",))
    assert one.key == same.key != Mutant(one.name, one.file, one.text, ("b",)).key
    assert one.key != Mutant("x", one.file, text.replace("BROKE = 70", "BROKE = 72"), ("a",)).key
