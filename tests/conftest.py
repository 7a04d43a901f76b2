"""Tests run on one thread each, without a network; shapes are checked, warnings are errors (pyproject.toml)."""

import gc
import os
import sys
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import install_import_hook
from tests.quick import mark_long, pytest_addoption, pytest_runtest_call, pytest_runtest_setup  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what is traced here is traced once, so that shapes kept for later calls take a third of the time and are never asked
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
torch.set_num_threads(1)
# what torch.empty gives is filled with NaN, so that scratch which is read before it is written shows
torch.use_deterministic_algorithms(True)
assert torch.utils.deterministic.fill_uninitialized_memory

# shapes and types of these are checked while tests run; what torch.compile traces is left as it is
CHECKED = ["regard.methods.caches", "regard.ops.budget", "regard.ops.topk"]
install_import_hook(CHECKED, "beartype.beartype")


def pytest_collection_finish() -> None:
    stays()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    done = yield
    if nextitem is not None and nextitem.path != item.path:
        stays()
    return done


def stays() -> None:
    """What is loaded by now stays: garbage collection does not walk through it again and again.

    Late in the suite a walk takes more than a second, and every case of a benchmark asks for one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def measured_here(monkeypatch) -> None:
    """Cells that workers would measure are measured in this process: for tests that ask what is measured, not by whom.

    A worker's start imports torch and transformers, some seconds; tests/test_executors.py holds workers to this.
    """
    from regard.bench.executor import InProcess, LocalProcesses

    here = lambda self, cells, load: InProcess().run(cells, load)  # noqa: E731
    monkeypatch.setattr(LocalProcesses, "run", here)


@dataclass(frozen=True)
class Ended:
    """What a command came to, as `subprocess.run` names it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def regard_command(monkeypatch, capfd):
    """`regard WORDS` in this process, as the installed command runs it: a process of its own imports for seconds."""

    def run(*words: str) -> Ended:
        from regard import cli

        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
        monkeypatch.setattr(sys, "argv", ["regard", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(end.value.code, *capfd.readouterr())

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    mark_long(items)


def pytest_xdist_make_scheduler(config, log):
    """Of several processes one has all of a file (tests/processes.py), where no other `--dist` is asked for."""
    from tests.processes import ByFile

    return ByFile(config, log) if config.getvalue("dist") == "loadscope" else None
