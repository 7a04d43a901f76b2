"""What `make test` leaves out, and how long each test takes.

long.txt names the tests that `make test` leaves out, those of a tenth of a second and more of the processor;
`make test-all` asks them all. One that alone sees a planted fault of mutants/ stays where it takes less than ALONE
seconds. To make the list: `pytest --times FILE` writes what each test takes of the processor, its children included,
and `python tests/quick.py FILE` makes long.txt of that.
"""

import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIST = HERE / "long.txt"
LONG, ALONE = 0.1, 20.0  # seconds
SETUP = 5.0  # what takes so many to set up for one test of a file counts for all of them
FIT = "tests/test_mutants.py::test_every_fault_still_fits_its_file_and_has_a_name_of_its_own"
# of pages test_every_page.py has a short form; and what a change of the code most often breaks
STAY = ("tests/test_every_page.py::test_page", "tests/test_floors.py", FIT)


def pytest_addoption(parser) -> None:
    parser.addoption("--times", metavar="FILE", help="append what each test takes of the processor to FILE")


def mark_long(items) -> None:
    """The tests that the list names are `long`."""
    long = set(listed())
    for item in items:
        if item.nodeid in long:
            item.add_marker(pytest.mark.long)


def listed() -> list[str]:
    return LIST.read_text(encoding="utf8").splitlines()


def spent() -> float:
    """Seconds of the processor of this process and of its children that have ended."""
    return sum(os.times()[:4])


def timed(item, phase: str):
    start = spent()
    done = yield
    if (file := item.config.getoption("--times")) is not None:
        with Path(file).open("a", encoding="utf8") as rows:
            rows.write(f"{spent() - start:.3f} {phase} {item.nodeid}\n")
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from timed(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from timed(item, "call"))


def laws() -> list[list[str]]:
    """Of every planted fault that is no claim's, the tests that see it: a test, or all of a function, class or file."""
    files = sorted((HERE / "mutants").glob("*.toml"))
    faults = [fault for path in files for fault in tomllib.loads(path.read_text(encoding="utf8"))["fault"]]
    return [law for fault in faults if (law := fault.get("law")) and "claim_faults" not in str(law)]


def of(law: str, tests: Iterable[str]) -> list[str]:
    """Those of the tests that a law names."""
    return [test for test in tests if test == law or test.startswith((law + "[", law + "::"))]


def long_of(times: Mapping[str, float]) -> list[str]:
    """The tests that are left out."""
    long = {test for test, took in times.items() if took >= LONG and not test.startswith(STAY)}
    for law in laws():
        left = [of(name, long) for name in law]
        if all(left):
            cheapest = min(left, key=lambda tests: sum(times[test] for test in tests))
            if sum(times[test] for test in cheapest) < ALONE:
                long -= set(cheapest)
    return sorted(long)


def times_of(rows: Iterable[str]) -> dict[str, float]:
    """What each test takes, with what was set up for its file."""
    calls, setups = {}, {}
    for took, phase, test in (row.split(" ", 2) for row in rows):
        file = test.partition("::")[0]
        if phase == "call":
            calls[test] = float(took)
        elif float(took) >= SETUP:
            setups[file] = max(float(took), setups.get(file, 0.0))
    return {test: took + setups.get(test.partition("::")[0], 0.0) for test, took in calls.items()}


if __name__ == "__main__":
    measured = times_of(Path(sys.argv[1]).read_text(encoding="utf8").splitlines())
    LIST.write_text("\n".join(long_of(measured)) + "\n")
