"""Families one after the other in a process beside this one, so that a crash or a hang is a row and not the end."""

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection

from regard.core import unknown
from regard.testing.families.build import names
from regard.testing.families.examine import FamilyRow, examine

LIMIT = 60.0  # seconds that a family may take


def survey(which: Iterable[str] | None = None, limit: float = LIMIT) -> Iterator[FamilyRow]:
    """A row for each of these families, None: all; in `limit` seconds each, or it is a row that says so.

    Raises KeyError for a name that is none.
    """
    chosen, worker = names() if which is None else list(which), None
    for name in chosen:
        if name not in names():
            raise unknown("causal decoder", name, names())
    try:
        for name in chosen:
            worker = worker or Worker()
            row = worker.ask(name, limit)
            if row.verdict == "crashed" and not row.outcomes:
                worker = None
            yield row
    finally:
        if worker is not None:
            worker.end()


class Worker:
    """A process that examines the families it is told."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of this one
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, limit: float) -> FamilyRow:
        """The family's row; if the process dies or takes too long it is ended, and the row says how."""
        try:
            self.pipe.recv()  # it is ready: what it imports is not the family's time
            self.pipe.send(name)
            if self.pipe.poll(limit):
                return self.pipe.recv()
            why = f"no answer in {limit:g} seconds"
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            why = f"its process ended by signal {-code}" if code < 0 else f"its process ended with {code}"
        self.end()
        return FamilyRow(name, verdict="crashed", why=why)

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection) -> None:
    """Examine what is asked for until the other end closes."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    while True:
        pipe.send("ready")
        try:
            name = pipe.recv()
        except EOFError:
            return
        with redirect_stdout(StringIO()):  # some models print, and what is asked for goes there
            row = examine(name)
        pipe.send(row)
