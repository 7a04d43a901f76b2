"""Where cells run. An executor takes cells and yields rows as they end; another (a cluster's) can take its place.

`LocalProcesses` keeps a few worker processes, each with the model loaded once. A cell that raises, runs out of
memory, is killed or passes its time limit becomes a row that says so; its worker is replaced, the run goes on.
"""

import ast
import multiprocessing as mp
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from regard import catalog
from regard.bench.cell import Bench, Cell, measure
from regard.core import Unreachable, Unsupported
from regard.core.deprecation import moved

Loader = Callable[[], tuple[Any, Any]]


class Executor(Protocol):
    """Runs cells in any order and yields one row for each."""

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]: ...


def safely(cell: Cell, bench: Bench) -> dict:
    """Measure a cell; whatever goes wrong becomes its row."""
    try:
        return measure(cell, bench)
    except Exception as error:
        return cell.row(**why(error))


def why(error: Exception) -> dict[str, str]:
    """The status of a cell that failed, and the error in words: "unsupported", "memory" or "failed"."""
    if isinstance(error, Unsupported | Unreachable):
        return {"status": "unsupported", "error": str(error)}
    if isinstance(error, MemoryError):
        return {"status": "memory", "error": str(error) or "out of memory"}
    text = str(error).lower()
    memory = "memory" in text and ("alloc" in text or "out of" in text)
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
    return {"status": "memory" if memory else "failed", "error": message}


@dataclass
class InProcess:
    """One cell after the other in this process: for a model that only lives here."""

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]:
        bench = Bench(*load())
        for cell in cells:
            yield safely(cell, bench)


def work(pipe: Connection, load: Loader, threads: int, pages: dict[str, str]) -> None:
    """A worker's life: register the pages of one's own, load the model, then cells until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # the run may end, and with it the pipe, at any time
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            catalog.adopt(pages)
            bench = Bench(*load())
        except BaseException as error:
            pipe.send(("broken", f"{type(error).__name__}: {error}"))
            return
        pipe.send(("ready", ""))
        while True:
            pipe.send(("row", safely(pipe.recv(), bench)))


GUARD = "if __name__ == '__main__':"


def guarded(source: str) -> bool:
    """Whether a script keeps what it does away from those who import it.

    >>> guarded("import regard"), guarded("if __name__ == '__main__': main()")
    (False, True)
    """
    tests = [node.test for node in ast.parse(source).body if isinstance(node, ast.If)]
    return any(getattr(part, "id", "") == "__name__" for test in tests for part in ast.walk(test))


def runs_again(main: Any) -> bool:
    """Whether a process that imports the script `main`, as a spawned one does, would do its work again, or cannot."""
    path = getattr(main, "__file__", None)
    if path is None:
        return False
    try:
        return not guarded(Path(path).read_text(encoding="utf8"))
    except (OSError, SyntaxError, ValueError):  # such as <stdin>
        return True


@contextmanager
def main_kept_out() -> Iterator[None]:
    """Processes started here import the user's script only if it is guarded; a plain one would begin its run again."""
    main = sys.modules["__main__"]
    if runs_again(main):
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """A process and what it is busy with."""

    def __init__(self, load: Loader, threads: int, limit: float) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, load, threads, catalog.registered()), daemon=True
        )
        with main_kept_out():
            self.process.start()
        theirs.close()
        self.cell: Cell | None = None
        # (task, length, seed) whose samples it holds
        self.last: tuple[str, int, int] | None = None
        self.ready, self.limit, self.deadline = False, limit, float("inf")

    def assign(self, cell: Cell) -> None:
        self.cell, self.deadline = cell, time.monotonic() + self.limit
        self.pipe.send(cell)

    def stop(self) -> None:
        """An idle worker ends by itself when its pipe closes; a busy one is killed."""
        self.pipe.close()
        if self.cell is None:
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


def script_text() -> str:
    """What a script may have to do with a worker that cannot load its model."""
    main = sys.modules["__main__"]
    if runs_again(main):
        return f" (workers do not run {main.__file__}; what they need of it stands above `{GUARD}`, the run below)"
    return ""


class WorkerBroken(RuntimeError):
    """A worker could not load the model; the message is its error."""


@dataclass
class LocalProcesses:
    """`workers` processes of `threads` threads each; `limit` seconds a cell."""

    workers: int = 2
    threads: int = 1
    limit: float = 600.0

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]:
        left = list(cells)[::-1]
        crew = [Worker(load, self.threads, self.limit) for _ in range(min(self.workers, len(left)))]
        try:
            while left or any(w.cell for w in crew):
                for worker in list(crew):
                    if worker.ready and worker.cell is None and left:
                        worker.assign(take_near(left, worker))
                yield from self._collect(crew, load, bool(left))
        finally:
            for worker in crew:
                worker.stop()

    def _collect(self, crew: list[Worker], load: Loader, more: bool) -> Iterator[dict]:
        soonest = min(w.deadline for w in crew)
        wait([w.pipe for w in crew], timeout=min(1.0, max(0.0, soonest - time.monotonic())))
        for i, worker in enumerate(crew):
            row = self._receive(worker)
            if row is not None:
                yield row
            if not worker.process.is_alive() and not worker.ready:
                crew[i] = Worker(load, self.threads, self.limit)

    def _receive(self, worker: Worker) -> dict | None:
        """The row a worker ended, if it did; a dead or late one gives the row that says so and stops."""
        try:
            if worker.pipe.poll():
                kind, content = worker.pipe.recv()
                if kind == "broken":
                    raise WorkerBroken(content + script_text())
                worker.ready = True
                if kind == "row":
                    worker.cell, worker.deadline = None, float("inf")
                    return content
        except (EOFError, ConnectionResetError):
            return self._lost(worker, "failed", "the worker ended")
        if worker.cell is not None and time.monotonic() > worker.deadline:
            return self._lost(worker, "timeout", f"longer than the limit of {self.limit:g} s")
        return None

    @staticmethod
    def _lost(worker: Worker, status: str, error: str) -> dict | None:
        worker.process.join(timeout=1)
        code = worker.process.exitcode
        if status == "failed" and code == -signal.SIGKILL:
            status, error = "memory", "the worker was killed (signal 9), most likely for memory"
        elif status == "failed":
            error = f"the worker ended with exit code {code}"
        cell, loaded = worker.cell, worker.ready
        worker.stop()
        worker.cell, worker.ready, worker.deadline = None, False, float("inf")
        if not loaded:
            raise WorkerBroken(f"while the model was loading: {error}{script_text()}")
        return None if cell is None else cell.row(status=status, error=error)


def take_near(left: list[Cell], worker: Worker) -> Cell:
    """The next cell, if possible of the task and length whose samples the worker still holds."""
    for i in range(len(left) - 1, -1, -1):
        if (left[i].task, left[i].length, left[i].seed) == worker.last:
            return left.pop(i)
    cell = left.pop()
    worker.last = (cell.task, cell.length, cell.seed)
    return cell


__getattr__ = moved(__name__, {"Broken": "regard.bench.executor:WorkerBroken"})
