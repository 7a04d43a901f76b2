"""What every command uses: the app, the two streams, JSON, words and numbers as they are typed, a progress bar."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from regard.report.floor import FLOOR

app = typer.Typer(
    help="A catalogue and workbench of attention for transformer models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def say_json(data: Any) -> None:
    """Data as JSON; what is no finite number is null, since JSON has neither NaN nor infinity."""
    typer.echo(json.dumps(finite(data), indent=1, ensure_ascii=False, default=str, allow_nan=False))


def finite(data: Any) -> Any:
    """The same data with None in the place of NaN and infinity, tuples as lists.

    >>> finite({"loss": [0.5, float("nan")], float("inf"): (1,)})
    {'loss': [0.5, None], 'inf': [1]}
    """
    if isinstance(data, Mapping):
        return {
            str(key) if isinstance(key, float) and not math.isfinite(key) else key: finite(value)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class Stopped(Exception):
    """Ctrl-C during a command that says what is true of its work then. (Of KeyboardInterrupt typer keeps no words.)"""


@contextmanager
def if_stopped(kept: str) -> Iterator[None]:
    """Within the block, Ctrl-C ends the command with a sentence on what is kept and what the same command does."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(kept) from stop


class watching:
    """A progress bar on the error stream, with what fails as it happens; silent for programs.

    Where the stream is no terminal, a line now and then in its place: how many are done, and how long the rest takes
    at the pace of those that were.
    """

    EVERY = 30.0  # seconds between two lines

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began, self.first, self.told = quiet, 0.0, 0, 0.0

    def __enter__(self):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description:<34.34}"), BarColumn(), MofNCompleteColumn())
        hidden = self.quiet or not err.is_terminal
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=hidden)
        self.task = self.bar.add_task("loading the model", total=None)
        return self.step

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, row: dict | None, done: int, total: int) -> None:
        if row is None:
            self.began = self.told = time.monotonic()
            self.first = done
            self.bar.update(self.task, completed=done, total=total)
            self.bar.start()
            return
        text = f"{row['label']} {row['budget'] or ''} {row['task']} {row.get('length', '')}"
        self.bar.update(self.task, completed=done, total=total, description=text)
        if row["status"] not in ("ok", FLOOR):
            self.say(f"{row['status']}: {text}: {row['error']}")
        if not err.is_terminal and time.monotonic() - self.told >= self.EVERY:
            self.told = time.monotonic()
            self.say(progress_text(done, total, (self.told - self.began) / (done - self.first)))

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def progress_text(done: int, total: int, each: float) -> str:
    """How many are done and how long the others take, at so many seconds for each.

    >>> progress_text(30, 120, 10.0)
    '30 of 120 done, about 15 min left'
    """
    left = (total - done) * each
    return f"{done} of {total} done, about {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} left"


class counting:
    """A progress bar over things with a name; silent for programs."""

    def __init__(self, quiet: bool, total: int) -> None:
        self.quiet, self.total = quiet, total

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<24.24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=err, disable=self.quiet)
        self.bar.start()
        self.task = self.bar.add_task("starting", total=self.total)
        return self.step

    def step(self, name: str, done: int) -> None:
        self.bar.update(self.task, completed=done, description=name)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class training:
    """A progress bar with the loss and the last score of a training run; silent for programs."""

    def __init__(self, quiet: bool, total: int) -> None:
        self.quiet, self.total, self.score = quiet, total, None

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=err, disable=self.quiet)
        self.bar.start()
        self.task = self.bar.add_task("starting", total=self.total)
        return self.step

    def step(self, point: dict) -> None:
        self.score = point["score"] if point["score"] is not None else self.score
        scored = "" if self.score is None else f"  score {self.score:.3f}"
        run = f"{point['run']}  " if "run" in point else ""
        text = f"{run}rate {point['rate']:g}  loss {point['loss']:.3f}{scored}"
        self.bar.update(self.task, completed=point["done"], description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class converting:
    """A progress bar over the stages of a conversion; silent for programs."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.stage = quiet, ""

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=err, disable=self.quiet)
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None)
        return self

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.console.print(text, highlight=False, markup=False)

    def step(self, stage: str, done: int, total: int, loss: float) -> None:
        if stage != self.stage:
            self.stage = stage
            self.bar.reset(self.task, total=total)
        text = f"{stage}  loss {loss:.3f}" if loss else stage
        self.bar.update(self.task, completed=done, total=total, description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class stages:
    """A progress bar that begins anew with each stage; silent for programs."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.stage = quiet, ""

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<24.24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=err, disable=self.quiet)
        self.bar.start()
        self.task = self.bar.add_task("loading the model", total=None)
        return self.step

    def step(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.stage = stage
            self.bar.reset(self.task, total=total)
        self.bar.update(self.task, completed=done, total=total, description=stage)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
