"""What every command uses: the app, the two streams, JSON, words and numbers as they are typed, a progress bar."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="A catalogue and workbench of attention for transformer models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def say_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False, default=str))


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
    """A progress bar on the error stream, with what fails as it happens; silent for programs."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

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
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=self.quiet
        )
        self.bar.start()
        self.task = self.bar.add_task("loading the model", total=None)
        return self.step

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, row: dict | None, done: int, total: int) -> None:
        text = (
            "loading the model"
            if row is None
            else f"{row['label']} {row['budget'] or ''} {row['task']} {row.get('length', '')}"
        )
        self.bar.update(self.task, completed=done, total=total, description=text)
        if row is not None and row["status"] != "ok" and not self.quiet:
            self.bar.console.print(f"{row['status']}: {text}: {row['error']}", style="yellow", markup=False)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


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
