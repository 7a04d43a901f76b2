"""The command line. `--json` everywhere; errors say what to do; one room for each kind of command."""

import os
import sys

import typer

from regard.cli import (  # noqa: F401  (they add their commands)
    compare,
    convert,
    doctor,
    evaluate,
    explain,
    laws,
    measure,
    pages_list,
    pages_new,
    pages_show,
    reports,
    train,
    version,
)
from regard.cli.console import Stopped, app, err, say_json

__all__ = ["app", "main"]

STOPPED = 130
KNOWN = (ValueError, KeyError, OSError)


def main() -> None:
    """Run the command; an error of the user's is one line, exit status 2; Ctrl-C ends with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    kept = ""
    try:
        status = app(prog_name="regard", standalone_mode=False) or 0  # a typer.Exit comes back as its status
    except Stopped as stop:
        status, kept = STOPPED, str(stop)
    except (KeyboardInterrupt, typer.Abort):
        status = STOPPED
    except Exception as error:
        status = complain(error, as_json="--json" in sys.argv[1:])
    if status == STOPPED:
        err.print(f"\nstopped. {kept}".rstrip(), markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def complain(error: Exception, as_json: bool = False) -> int:
    """Say an error of the user's in one line; anything else is a fault of ours and keeps its traceback.

    With `as_json` it is said on the output stream: {"error": {"type": ..., "message": ...}}, exit status 2.
    """
    of_click = hasattr(error, "show") and hasattr(error, "exit_code")  # a wrong option, an unknown command
    if not of_click and not isinstance(error, KNOWN) and not type(error).__module__.startswith("regard."):
        raise error
    if as_json:
        say_json({"error": {"type": type(error).__name__, "message": message_of(error)}})
        return 2
    if of_click:
        error.show()  # type: ignore[attr-defined]
        return error.exit_code  # type: ignore[attr-defined]
    err.print(f"regard: {message_of(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


def message_of(error: Exception) -> str:
    if hasattr(error, "format_message"):
        return error.format_message()
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
