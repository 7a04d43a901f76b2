"""What an executor is, what becomes of a cell that goes wrong, and scripts that must not run twice."""

import ast
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from regard import catalog
from regard.bench.cell import Cell
from regard.core import Unreachable, Unsupported, require
from regard.core.errors import present
from regard.ops import parse_budget

Loader = Callable[[], tuple[Any, Any]]


class Executor(Protocol):
    """Runs cells in any order and yields one row for each."""

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]: ...


class WorkerBroken(RuntimeError):
    """A worker could not load the model, or could not be started; the message is its error."""


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


@dataclass(frozen=True)
class Away:
    """What a process on another machine, or in another shell, needs to be as this one is: `settle` there."""

    pickled: bytes  # the loader, which may come from a module that is only found once `paths` are
    threads: int
    limit: float
    pages: dict[str, str]
    paths: list[str]  # where this process finds modules: pages of one's own may be some

    @classmethod
    def from_here(cls, load: Loader, threads: int, limit: float) -> "Away":
        paths = [str(Path(path).absolute()) for path in sys.path]
        return cls(pickle.dumps(load), threads, limit, catalog.registered(), paths)

    def settle(self) -> Loader:
        """Take over pages of one's own and the places where modules are found; what a worker loads the model with."""
        sys.path += [path for path in self.paths if path not in sys.path]
        catalog.adopt(self.pages)
        return partial(load_pickled, self.pickled)


def load_pickled(loader: bytes) -> tuple[Any, Any]:
    """What a loader loads that is unpickled only now: its module may import what a worker alone needs."""
    return pickle.loads(loader)()


def optional(name: str) -> Any:
    """An optional package; ValueError that names its extra where it is not installed."""
    rule = f"--executor {name} is run with the extra regard[{name}]: pip install 'regard[{name}]'"
    require(find_spec(name) is not None, rule, missing=name)
    return import_module(name)


def variables() -> dict[str, str]:
    """Variables of this environment that say where models and pages lie."""
    names = ("REGARD_", "HF_", "TRANSFORMERS_")
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def memory_bytes(text: str) -> int:
    """Bytes of "32GB".

    >>> memory_bytes("32GB")
    32000000000
    """
    size = parse_budget(text).bytes if isinstance(text, str) else None
    return present(size, 'mem reads like "32GB"', mem=text)


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
def main_kept_out(always: bool = False) -> Iterator[None]:
    """Processes started here import the user's script only if it is guarded; a plain one would begin its run again.

    `always`: where `__main__` is the program of a cluster's job, which no worker needs.
    """
    main = sys.modules["__main__"]
    if always or runs_again(main):
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def script_text() -> str:
    """What a script may have to do with a worker that cannot load its model."""
    main = sys.modules["__main__"]
    if runs_again(main):
        return f" (workers do not run {main.__file__}; what they need of it stands above `{GUARD}`, the run below)"
    return ""
