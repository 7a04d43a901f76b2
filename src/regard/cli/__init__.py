"""The command line. `--json` everywhere; errors say what to do; one room for each kind of command."""

import os
import sys

import typer

from regard.cli import (  # noqa: F401  (they add their commands)
    convert,
    doctor,
    evaluate,
    explain,
    laws,
    measure,
    pages,
    reports,
    train,
)
from regard.cli.console import Stopped, app, err

__all__ = ["app", "main"]

STOPPED = 130
KNOWN = (ValueError, KeyError, OSError)


def main() -> None:
    """Run the command; an error of the user's is one line, exit status 2; Ctrl-C ends with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    kept = ""
    try:
        status = app(standalone_mode=False) or 0  # a typer.Exit comes back as its status
    except Stopped as stop:
        status, kept = STOPPED, str(stop)
    except (KeyboardInterrupt, typer.Abort):
        status = STOPPED
    except Exception as error:
        status = complain(error)
    if status == STOPPED:
        err.print(f"\nstopped. {kept}".rstrip(), markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def complain(error: Exception) -> int:
    """Say an error of the user's in one line; anything else is a fault of ours and keeps its traceback."""
    # click's own: a wrong option, an unknown command
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return error.exit_code
    if not isinstance(error, KNOWN) and not type(error).__module__.startswith("regard."):
        raise error
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    err.print(f"regard: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2
