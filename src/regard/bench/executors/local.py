"""Worker processes of this machine, each with the model loaded once.

A cell that raises, runs out of memory, is killed or passes its time limit becomes a row that says so; its worker is
replaced, the run goes on. Jobs and actors on other machines have their cells measured by a worker too (`Steady`), so
that what goes wrong reads the same everywhere.
"""

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from regard import catalog
from regard.bench.cell import Cell
from regard.bench.executors.base import Loader, WorkerBroken, main_kept_out, script_text


def work(pipe: Connection, load: Loader, threads: int, pages: dict[str, str]) -> None:
    """A worker's life: register the pages of one's own, load the model, then cells until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch
    from transformers.utils import logging

    from regard.bench.measuring import Bench, safely

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


def end_with_parent() -> None:
    """A worker in the middle of a cell ends with the process that started it, also where that one was killed."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
        # one that was killed just now is seen by `receive`, which gives the cell its row
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(cell)

    def receive(self) -> dict | None:
        """The row it ended, if it did; a dead or late one gives the row that says so and stops."""
        try:
            if self.pipe.poll():
                kind, content = self.pipe.recv()
                if kind == "broken":
                    raise WorkerBroken(content + script_text())
                self.ready = True
                if kind == "row":
                    self.cell, self.deadline = None, float("inf")
                    return content
        except (EOFError, ConnectionResetError):
            return self._lost("failed", "the worker ended")
        if self.cell is not None and time.monotonic() > self.deadline:
            return self._lost("timeout", f"longer than the limit of {self.limit:g} s")
        return None

    def _lost(self, status: str, error: str) -> dict | None:
        self.process.join(timeout=1)
        code = self.process.exitcode
        if status == "failed" and code == -signal.SIGKILL:
            status, error = "memory", "the worker was killed (signal 9), most likely for memory"
        elif status == "failed":
            error = f"the worker ended with exit code {code}"
        cell, loaded = self.cell, self.ready
        self.stop()
        self.cell, self.ready, self.deadline = None, False, float("inf")
        if not loaded:
            raise WorkerBroken(f"while the model was loading: {error}{script_text()}")
        return None if cell is None else cell.row(status=status, error=error)

    def stop(self) -> None:
        """An idle worker ends by itself when its pipe closes; a busy one is killed."""
        self.pipe.close()
        if self.cell is None:
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


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
                yield from self._collect(crew, load)
        finally:
            for worker in crew:
                worker.stop()

    def _collect(self, crew: list[Worker], load: Loader) -> Iterator[dict]:
        soonest = min(w.deadline for w in crew)
        wait([w.pipe for w in crew], timeout=min(1.0, max(0.0, soonest - time.monotonic())))
        for i, worker in enumerate(crew):
            row = worker.receive()
            if row is not None:
                yield row
            if not worker.process.is_alive() and not worker.ready:
                crew[i] = Worker(load, self.threads, self.limit)


class Steady:
    """One worker that is asked cell by cell and replaced when it is lost; WorkerBroken where it cannot load."""

    def __init__(self, load: Loader, threads: int, limit: float) -> None:
        self.made = (load, threads, limit)
        self.worker = self._make()
        self._until_ready()

    def _make(self) -> Worker:
        with main_kept_out(always=True):
            return Worker(*self.made)

    def _until_ready(self) -> None:
        while not self.worker.ready:
            wait([self.worker.pipe], timeout=1.0)
            self.worker.receive()

    def measure(self, cell: Cell) -> dict:
        """The row of a cell, whatever becomes of it."""
        if not self.worker.process.is_alive():
            self.worker.stop()
            self.worker = self._make()
        self._until_ready()
        self.worker.assign(cell)
        while (row := self.worker.receive()) is None:
            wait([self.worker.pipe], timeout=min(1.0, max(0.0, self.worker.deadline - time.monotonic())))
        return row

    def stop(self) -> None:
        self.worker.stop()


def take_near(left: list[Cell], worker: Worker) -> Cell:
    """The next cell, if possible of the task and length whose samples the worker still holds."""
    for i in range(len(left) - 1, -1, -1):
        if (left[i].task, left[i].length, left[i].seed) == worker.last:
            return left.pop(i)
    cell = left.pop()
    worker.last = (cell.task, cell.length, cell.seed)
    return cell
