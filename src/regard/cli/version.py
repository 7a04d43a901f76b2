"""regard --version."""

from importlib.metadata import version
from platform import python_version
from typing import Annotated

import typer

from regard.cli.console import app

PACKAGES = ("regard", "torch", "transformers")


def say_versions(asked: bool) -> None:
    """From the packages' metadata: none of them is imported."""
    if asked:
        for name, number in {**{p: version(p) for p in PACKAGES}, "python": python_version()}.items():
            typer.echo(f"{name} {number}")
        raise typer.Exit()


@app.callback()
def regard(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=say_versions,
            is_eager=True,
            help="The versions of regard and of what it stands on.",
        ),
    ] = False,
) -> None:
    pass
