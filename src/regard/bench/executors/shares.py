"""What one job of a cluster is handed, and what it writes down: rows as they end, and the cell that it is busy with.

A job measures many cells, since what is dear is shared by neighbours: a place in the queue, the load of the model, the
samples and full attention's passes of a task and length. Each row is a file of its own as soon as its cell ends, so a
job that is killed loses the one cell that it was in; the others of its share go on in another job.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.bench.cell import Cell
from regard.bench.executors.base import Away
from regard.bench.executors.local import Steady
from regard.report.folder import write_whole

SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"  # names the signal that comes before a job's time is up, if it is not USR2


def shares(cells: Sequence[Cell], jobs: int) -> list[list[Cell]]:
    """Neighbouring cells for about `jobs` jobs: none has more than its part, or cells of two tasks or lengths.

    >>> cells = [Cell("full", "needle", n, samples=s) for n in (64, 96) for s in (1, 2, 3)]
    >>> [[c.samples for c in share] for share in shares(cells, jobs=3)]
    [[1, 2], [3], [1, 2], [3]]
    """
    most, made = -(-len(cells) // jobs), []
    for cell in cells:
        last = made[-1][-1] if made else None
        near = last and (last.task, last.length, last.seed) == (cell.task, cell.length, cell.seed)
        if near and len(made[-1]) < most:
            made[-1].append(cell)
        else:
            made.append([cell])
    return made


@dataclass(frozen=True)
class Board:
    """The folder of one share, where its job and the run that submitted it see each other."""

    path: Path

    def begin(self, cell: Cell) -> None:
        (self.path / f"{cell.key}.begun").touch()

    def leave(self, cell: Cell) -> None:
        """Not begun after all."""
        (self.path / f"{cell.key}.begun").unlink(missing_ok=True)

    def begun(self, cell: Cell) -> bool:
        return (self.path / f"{cell.key}.begun").exists()

    def write(self, cell: Cell, row: dict) -> None:
        text = json.dumps({**row, "host": socket.gethostname()}, ensure_ascii=False, default=float)
        write_whole(self.path / f"{cell.key}.json", text)

    def row(self, cell: Cell) -> dict | None:
        path = self.path / f"{cell.key}.json"
        return json.loads(path.read_text(encoding="utf8")) if path.exists() else None

    def stop(self) -> None:
        """The job ends before its next cell, wherever it runs and whoever still knows of it."""
        (self.path / "stop").touch()

    def stopped(self) -> bool:
        return (self.path / "stop").exists()

    def refresh(self) -> None:
        """Network file systems show new files at once after a change of the folder, else in up to a minute."""
        self.path.chmod(self.path.stat().st_mode)


LOOK = 0.5  # seconds between looks at whether the overseer lives


class TimeUp(BaseException):
    """The job's time is nearly over. Not an Exception: a cell must not take it for an error of its own."""


@contextmanager
def heard_time() -> Iterator[None]:
    """Within the block, the signal that comes before the end of a job's time raises TimeUp."""

    def end(*_: Any) -> None:
        raise TimeUp

    number = getattr(signal, "SIG" + os.environ.get(SIGNAL, "USR2"))
    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def end_with(parent: int) -> None:
    """A job ends with the process that oversees it: nobody waits for its rows any more, and a cell may take long."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def measure_share(path: Path, cells: Sequence[Cell], away: Away, minutes: int) -> str:
    """What a job does: the rows of its cells, one by one; "done", or why it ended before: "stopped", "time".

    Cells that have a row are left out: Slurm may start a job again from its beginning.
    """
    board = Board(path)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    load = away.settle()
    left = [cell for cell in cells if board.row(cell) is None]
    with heard_time():
        steady = Steady(load, away.threads, away.limit)
        try:
            return each(board, left, steady, minutes)
        finally:
            steady.stop()


def each(board: Board, left: Sequence[Cell], steady: Steady, minutes: int) -> str:
    """Cell by cell. One that the end of the job's time cuts short is for another job, unless it had all of the time."""
    i = 0
    try:
        for i, cell in enumerate(left):  # noqa: B007
            if board.stopped():
                return "stopped"
            board.begin(cell)
            board.write(cell, steady.measure(cell))
    except TimeUp:
        if board.row(left[i]) is None:
            board.leave(left[i])
            if i == 0:
                error = f"longer than the job's {minutes} minutes; --executor submitit:minutes= gives more"
                board.write(left[i], left[i].row(status="timeout", error=error))
        return "time"
    return "done"
