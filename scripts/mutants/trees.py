"""A mutant, and what tests say of it: copies of the tree in which one file is changed, and tests run under a limit."""

import compileall
import hashlib
import multiprocessing
import os
import py_compile
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEEN, UNSEEN, LATE, UNREACHED, BROKEN = "seen", "unseen", "late", "unreached", "broken"
UNCOLLECTED = "uncollected"  # a test that is there without the fault is not there with it
# of pytest's exit statuses; 0: all passed, 1: some failed, 2: stopped, as by an error at import
NO_SUCH_TEST, NOTHING_RAN = 4, 5
BROKE = 70  # not a test, but what runs them
# processes begin with these imported, as importing them takes longer than most laws; regard is not among them
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "transformers.generation", "plotly.graph_objects",
     "rich.console", "sklearn.datasets", "hypothesis", "beartype", "jaxtyping", "anyio"]
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file with its changed text, and pytest's arguments that are to see it."""

    name: str
    file: str
    text: str
    tests: tuple[str, ...] = ()
    room: str = ""

    @property
    def key(self) -> str:
        """Of the change and its tests; the rest of the file may move."""
        before = (ROOT / self.file).read_text().splitlines()
        changed = [line for line in self.text.splitlines() if line not in set(before)]
        return hashlib.sha256(repr((self.file, self.name, changed, self.tests)).encode()).hexdigest()[:16]


def outcomes(mutants: Sequence[Mutant], workers: int, limit: float) -> Iterator[tuple[Mutant, dict]]:
    """Each mutant with its row, as they end."""
    if not mutants:
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        free: queue.Queue[Path] = queue.Queue()
        for n in range(workers):
            free.put(copied(Path(folder) / str(n)))
        running = {pool.submit(judged, mutant, free, limit): mutant for mutant in mutants}
        for done in as_completed(running):
            yield running[done], done.result()


def copied(to: Path) -> Path:
    """What git knows of the tree, and what it does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    # told by its digest: a file that changes twice in a second, and keeps its length, would be taken from before
    by_digest = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(to / "src", quiet=2, invalidation_mode=by_digest)
    return to


def judged(mutant: Mutant, free: "queue.Queue[Path]", limit: float) -> dict:
    tree = free.get()
    path = tree / mutant.file
    before = path.read_text()
    start = time.monotonic()
    try:
        path.write_text(mutant.text)
        outcome, said = tested(tree, mutant.tests, limit) if mutant.tests else (UNREACHED, "")
    except (
        RuntimeError
    ) as error:  # such as a test whose name the fault has changed: a row, not the end of the run
        outcome, said = BROKEN, f"{str(error).partition(chr(10))[0]} {str(error)[-200:]}"
    finally:
        path.write_text(before)
        free.put(tree)
    row = {
        "key": mutant.key,
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "room": mutant.room,
    }
    return row | {"file": mutant.file, "name": mutant.name, "tests": len(mutant.tests), "by": said}


def tested(tree: Path, tests: Sequence[str], limit: float) -> tuple[str, str]:
    """What the tests say of a tree, and the line of the first that fails."""
    status, text = asked(tree, ("-x", *tests), limit)
    if status is None:
        return LATE, ""
    if status == NOTHING_RAN:
        return UNREACHED, ""
    if status == NO_SUCH_TEST and re.search("found no collectors|no match in any of", text):
        return UNCOLLECTED, text.splitlines()[-1][:200]
    # a fault may end the process itself
    if status not in (0, 1, 2) and status >= 0:
        raise RuntimeError(f"pytest could not run ({status}):\n{text[-4000:]}")
    return (SEEN if status else UNSEEN), ([line[:200] for line in failures(text)] or [""])[0]


def asked(tree: Path, arguments: Sequence[str], limit: float) -> tuple[int | None, str]:
    """pytest's exit status, None where time was up, and what it said."""
    said = tree / "mutant-said.txt"
    process = FORKS.Process(target=run_tests, args=(tree, tuple(arguments), said))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None, ""
    return process.exitcode, said.read_text(errors="replace")


def failures(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]


def end_with(parent: Any) -> None:
    """What runs here, and what it started, ends with the process that waits for it: also one that was killed."""
    parent.join()
    os.killpg(0, signal.SIGKILL)


def run_tests(tree: Path, arguments: Sequence[str], said: Path) -> None:
    """Run pytest here, in a process of its own group that was forked with torch in it, and end with its status."""
    os.setsid()
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.chdir(tree)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.pop("PYTEST_ADDOPTS", None)  # of who asks: what a tree says hangs on the tree alone
    sys.dont_write_bytecode = True  # of the fault; that of the tree as it is was written with the copy
    sys.path[:0] = [str(tree / "src"), str(tree)]
    status = BROKE
    try:
        import pytest

        # what was imported before the fork are no tests
        warned = "ignore::pytest.PytestAssertRewriteWarning"
        status = int(pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", "-W", warned, *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
