"""What `make test` leaves out, and how long each test takes.

long.txt names the tests that `make test` leaves out; `make test-all` runs them all. `--times FILE` writes what each test
took of the processor, its children included, and `python tests/quick.py FILE` makes long.txt of it.
"""

import os
from pathlib import Path

import pytest

LIST = Path(__file__).parent / "long.txt"


def pytest_addoption(parser) -> None:
    parser.addoption("--times", metavar="FILE", help="append what each test took of the processor to FILE")


def mark_long(items) -> None:
    long = set(LIST.read_text(encoding="utf8").splitlines())
    for item in items:
        if item.nodeid in long:
            item.add_marker(pytest.mark.long)


def spent() -> float:
    """Seconds of the processor of this process and of its children that have ended."""
    return sum(os.times()[:4])


def timed(item, phase: str):
    start = spent()
    done = yield
    if (file := item.config.getoption("--times")) is not None:
        with Path(file).open("a", encoding="utf8") as rows:
            rows.write(f"{spent() - start:.3f} {phase} {item.nodeid.removesuffix('@' + item.path.name)}\n")
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from timed(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from timed(item, "call"))
