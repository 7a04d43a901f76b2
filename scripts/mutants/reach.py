"""Which tests run which lines: the whole suite once under coverage, test by test."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trees import ROOT

# what these ask takes minutes to start, or is not installed everywhere
LEFT_OUT = "not real and not cluster and not harness and not oracles"


@dataclass(frozen=True)
class Reach:
    """tests: names; seconds of each; lines: file -> line -> numbers of tests; hashes: of the files as they were."""

    tests: list[str]
    seconds: list[float]
    lines: dict[str, dict[str, list[int]]]
    hashes: dict[str, str]

    def of(self, file: str, line: int) -> list[int]:
        """Tests that run a line, the quickest first; of one that no test runs, such as a default, those of its file."""
        there = self.lines.get(file, {})
        same = file in self.hashes and self.hashes[file] == digest(ROOT / file)
        found: Iterable[int] = there.get(str(line), []) if same else []
        found = set(found) or {t for tests in there.values() for t in tests}
        return sorted(found, key=lambda t: self.seconds[t])

    def within(self, tests: list[int], limit: float) -> tuple[str, ...]:
        """Names of as many of the tests as take so long together."""
        taken, total = [], 0.0
        for t in tests:
            total += self.seconds[t]
            if total > limit:
                break
            taken.append(self.tests[t])
        return tuple(taken)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path) -> Reach:
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `python scripts/mutants reach` first")
    return Reach(**json.loads(path.read_text()))


def measure(out: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, times = Path(folder) / "coverage", Path(folder) / "times.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "load",  # names without groups
            "-p", "no:cacheprovider", "-m", LEFT_OUT,
            "--cov=src/regard", "--cov-context=test", "--cov-report=", f"--junitxml={times}", "-W", "default",
        ]  # fmt: skip
        # a test that coverage itself upsets still says which lines it ran
        subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(data)}, check=False)
        write(out, *lines_of(data), seconds_of(times))


def lines_of(data: Path) -> tuple[dict[str, dict[int, set[str]]], set[str]]:
    """file -> line -> tests, and all tests. Who uses what another test of its file set up is not known: all of it."""
    from coverage import CoverageData

    measured = CoverageData(str(data))
    measured.read()
    found: dict[str, dict[int, set[str]]] = {}
    tests: set[str] = set()
    setups: list[tuple[str, int, str]] = []
    for path in measured.measured_files():
        file = str(Path(path).relative_to(ROOT))
        for line, contexts in measured.contexts_by_lineno(path).items():
            for context in filter(None, contexts):
                name, _, phase = context.rpartition("|")
                tests.add(name)
                found.setdefault(file, {}).setdefault(line, set()).add(name)
                if phase == "setup":
                    setups.append((file, line, name.partition("::")[0]))
    together: dict[str, set[str]] = {}
    for name in tests:
        together.setdefault(name.partition("::")[0], set()).add(name)
    for file, line, module in set(setups):
        found[file][line] |= together[module]
    return found, tests


def seconds_of(times: Path) -> dict[str, float]:
    """What each test took, by its name as pytest's command line has it."""
    found = {}
    for case in ElementTree.parse(times).getroot().iter("testcase"):
        module = case.attrib["classname"].replace(".", "/") + ".py"
        found[f"{module}::{case.attrib['name']}"] = float(case.attrib["time"])
    return found


def write(
    out: Path, lines: dict[str, dict[int, set[str]]], tests: set[str], seconds: dict[str, float]
) -> None:
    names = sorted(tests)
    number = {name: n for n, name in enumerate(names)}
    found = Reach(
        names,
        [seconds.get(name, 60.0) for name in names],
        {f: {str(n): sorted(number[t] for t in ts) for n, ts in by.items()} for f, by in lines.items()},
        {f: digest(ROOT / f) for f in lines},
    )
    out.write_text(json.dumps(vars(found)))
    print(f"{len(names)} tests, {len(lines)} files: {out}")
