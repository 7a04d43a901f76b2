"""Executors for many machines: rows are the same everywhere, a kill loses and doubles none, wrong values are named."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regard import catalog
from regard.bench.cell import FULL, Cell
from regard.bench.compare import compare
from regard.bench.executor import InProcess, LocalProcesses, Ray, Submitit, WorkerBroken, executor_of
from regard.bench.executors import base, shares, submitit
from regard.bench.executors.shares import Board, TimeUp, each
from regard.cli import app
from regard.models.shipped import load, load_shipped
from regard.report.result import TIMES

LM = partial(load_shipped, "lm")


def needs(name: str):
    """A test that an optional package is needed for."""
    missing = pytest.mark.skipif(
        find_spec(name) is None, reason=f"{name} is not installed: pip install 'regard[{name}]'"
    )
    return [pytest.mark.cluster, missing]


CLUSTERS = [pytest.param(name, marks=needs(name)) for name in ("submitit", "ray")]
ALL = ["local", *CLUSTERS]


def made(name: str, folder: Path, workers: int = 1, limit: float = 120.0, **settings):
    """An executor on this machine."""
    if name == "local":
        return LocalProcesses(workers, limit=limit, **settings)
    if name == "ray":
        return Ray(workers, limit=limit, **settings)
    return Submitit(folder / "jobs", "local", jobs=workers, limit=limit, **settings)


def processes() -> dict[int, tuple[int, str]]:
    """Pid -> (parent's pid, command) of all."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(path.name)] = (int(parent), words)
    return found


def descendants(words: str) -> list[int]:
    """Processes below this one whose command has these words."""
    known = processes()

    def below(pid: int) -> bool:
        return pid == os.getpid() or (pid in known and pid > 1 and below(known[pid][0]))

    return [pid for pid, (parent, text) in known.items() if words in text and below(parent)]


# Equal results


def facts(row: dict) -> dict:
    """All of a row but times, peaks and the machine."""
    apart = ("seconds", "host", "peak_bytes")
    return {k: v for k, v in row.items() if k not in apart and k not in TIMES}


def small(out: Path, executor, tasks=("needle", "perplexity")) -> dict[str, dict]:
    result = compare(
        None, ["streaming_llm", "h2o"], tasks, [96], [0.5], out=out, samples=2, executor=executor
    )
    assert {row["status"] for row in result.rows} == {"ok"} and len(result.rows) == 3 * len(tasks)
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(result.rows) + 3  # times of each method
    return {row["key"]: facts(row) for row in result.rows}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return small(tmp_path_factory.mktemp("here") / "out", InProcess())


@pytest.mark.parametrize("spec", ["local", pytest.param("submitit:cluster=local", marks=needs("submitit")),
                                  pytest.param("ray", marks=needs("ray"))])  # fmt: skip
def test_results_are_equal_on_all_executors(spec, here, tmp_path):
    assert small(tmp_path / "out", spec) == here
    assert {"quality", "nll", "kl", "bytes_held", "bytes_kept", "bytes_read"} <= set(
        next(iter(here.values()))
    )


# Kills


BUSY = [Cell(FULL, "needle", 96, samples=1), Cell("h2o", "needle", 96, 0.5, samples=4000),
        Cell("snapkv", "needle", 96, 0.5, samples=1)]  # fmt: skip
WORKER, JOB, CONTROLLER, ACTOR = (
    "spawn_main",
    "submitit.core._submit",
    "submitit.local._local",
    "ray::Measurer",
)
ALL_WORDS = (WORKER, JOB, CONTROLLER, ACTOR, "raylet")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
# of each executor, what is killed one after the other; a worker while it measures, not while it loads
VICTIMS = {"local": (WORKER,), "submitit": (JOB, CONTROLLER, WORKER), "ray": (WORKER, ACTOR)}
KILLED = dict(status="memory", error="killed (signal 9)")
LOST = {
    "submitit": dict(status="failed", error="was killed or lost in this cell"),
    "ray": dict(status="failed", error="was killed or its machine lost in this cell"),
}


def busy(victims: tuple[str, ...]) -> list[Cell]:
    """Cells that take long, one for each kill, between two short ones."""
    return [BUSY[0], *(replace(BUSY[1], samples=4000 + i) for i in range(len(victims))), BUSY[2]]


def killed(executor, victims: tuple[str, ...]) -> list[dict]:
    """Rows of `busy`, where a process is killed in each of the cells that take long."""
    rows: list[dict] = []
    gone: list[int] = []

    def kill():
        for i, victim in enumerate(victims):
            while len(rows) <= i or not begun(executor, busy(victims)[i + 1]):
                time.sleep(0.05)
            time.sleep(1.0)
            gone.extend(descendants(victim)[:1])
            os.kill(gone[i], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    for row in executor.run(busy(victims), LM):
        rows.append(row)
    killer.join()
    assert len(gone) == len(victims) and not {*gone} & {*processes()}
    return rows


def begun(executor, cell: Cell) -> bool:
    """Whether a job is in the cell; elsewhere the next cell is begun when a row is there."""
    return not isinstance(executor, Submitit) or any(Path(executor.folder).glob(f"*/{cell.key}.begun"))


@pytest.fixture(autouse=True, scope="module")
def orphans_come_here():
    """What loses its parent is a child of this process from then on, and is told from what others run beside it."""
    assert ctypes.CDLL(None).prctl(SUBREAPER, 1) == 0
    yield
    assert ctypes.CDLL(None).prctl(SUBREAPER, 0) == 0


def assert_nothing_runs(folder: Path) -> None:
    until = time.monotonic() + 60  # a worker that was just started sees it once it has imported
    while time.monotonic() < until and any(descendants(w) for w in (*ALL_WORDS, str(folder))):
        time.sleep(0.1)
    assert not {w: descendants(w) for w in (*ALL_WORDS, str(folder)) if descendants(w)}


@pytest.mark.parametrize("name", ALL)
def test_a_killed_worker_job_or_actor_loses_its_cell_alone(name, tmp_path):
    """One run, in which each is killed once: what goes on is a new one."""
    cells, found = busy(VICTIMS[name]), killed(made(name, tmp_path), VICTIMS[name])
    rows = {row["key"]: row for row in found}
    assert len(found) == len(cells) and {*rows} == {cell.key for cell in cells}
    for victim, cell in zip((None, *VICTIMS[name], None), cells, strict=True):
        said = {None: dict(status="ok", error=""), WORKER: KILLED}.get(victim) or LOST[name]
        row = rows[cell.key]
        assert row["status"] == said["status"] and said["error"] in row["error"], (victim, row)
    assert_nothing_runs(tmp_path)


def test_a_worker_in_a_cell_ends_with_the_process_that_started_it(tmp_path):
    text = "from regard.bench.executor import LocalProcesses\nfrom regard.bench.cell import Cell\n"
    text += "from functools import partial\nfrom regard.models.shipped import load_shipped\n"
    text += "cells = [Cell('full', 'needle', 96, samples=1), Cell('full', 'needle', 96, samples=9000)]\n"
    text += "for row in LocalProcesses(1).run(cells, partial(load_shipped, 'lm')): print('row', flush=True)\n"
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "row\n"
    time.sleep(0.5)
    (worker,) = descendants(WORKER)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 60
    while worker in processes() and time.monotonic() < until:
        time.sleep(0.05)
    assert worker not in processes()


# What workers know


LOADER = """
import torch
from regard.models.shipped import load_shipped

def load():
    assert torch.get_num_threads() == 3, torch.get_num_threads()
    return load_shipped("lm")
"""
SCRIPT = """
import os
import regard, my_loader
from regard.bench.cell import Cell
from regard.bench.executor import executor_of
print("begins")
regard.register("my_stream.py")
executor = executor_of({!r}, workers=1, limit=120.0, out="out")
for row in executor.run([Cell("my_stream", "needle", 96, 0.5, samples=1)], my_loader.load):
    print(row["status"], row["error"], row["method"], row["host"] == os.uname().nodename)
"""
PAGE = "from regard.methods.caches.streaming_llm import METHOD as BASE\nMETHOD = BASE\n"


@pytest.mark.parametrize("name", CLUSTERS)
def test_threads_pages_and_places_of_modules_go_along_and_a_script_does_not_run_again(name, tmp_path):
    """The loader lies beside the script, where Python finds it for the script alone."""
    (tmp_path / "my_stream.py").write_text(PAGE)
    (tmp_path / "my_loader.py").write_text(LOADER)
    spec = "ray:cpus=3" if name == "ray" else "submitit:cluster=local,cpus=3"
    (tmp_path / "script.py").write_text(SCRIPT.format(spec))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begins", "ok  my_stream True"]
    logs = "".join(path.read_text() for path in (tmp_path / "out").glob("jobs/logs/*.out"))
    assert "begins" not in logs
    assert "my_stream" not in catalog.registered()
    assert_nothing_runs(tmp_path)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_model_that_cannot_load_ends_the_run_with_its_error(name, tmp_path):
    with pytest.raises(WorkerBroken, match=r"^ValueError: no model can be loaded from 'no-such-model'"):
        list(made(name, tmp_path).run(BUSY, partial(load, "no-such-model")))
    assert_nothing_runs(tmp_path)


# Jobs and their shares


class Scripted:
    """In the place of a worker: what becomes of each cell."""

    def __init__(self, *ends) -> None:
        self.ends = list(ends)

    def measure(self, cell: Cell) -> dict:
        end = self.ends.pop(0)
        if end is TimeUp:
            raise TimeUp
        return cell.row()


def test_the_end_of_a_jobs_time_is_nobodys_failure_but_of_a_cell_that_had_all_of_it(tmp_path):
    board = Board(tmp_path)
    assert each(board, BUSY, Scripted("row", TimeUp), minutes=7) == "time"
    assert board.row(BUSY[0])["status"] == "ok" and board.row(BUSY[1]) is None and not board.begun(BUSY[1])
    assert each(board, BUSY[1:], Scripted(TimeUp), minutes=7) == "time"
    assert board.row(BUSY[1])["status"] == "timeout" and "job's 7 minutes" in board.row(BUSY[1])["error"]
    board.stop()
    assert each(board, BUSY[2:], Scripted("row"), minutes=7) == "stopped" and board.row(BUSY[2]) is None


def test_the_signal_of_time_is_heard_in_a_job_and_no_cell_takes_it_for_its_own():
    with pytest.raises(TimeUp), shares.heard_time():
        signal.raise_signal(signal.SIGUSR2)
    assert not issubclass(TimeUp, Exception) and signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_every_cell_is_in_one_share():
    cells = [
        Cell(FULL, task, n, samples=s) for task in ("needle", "recall") for n in (64, 96) for s in range(1, 8)
    ]
    for jobs in (1, 2, 3, 5, 28, 99):
        cut = shares.shares(cells, jobs)
        assert [cell for share in cut for cell in share] == cells
        assert all(len({(c.task, c.length) for c in share}) == 1 for share in cut)
        assert max(map(len, cut)) <= -(-len(cells) // jobs)


@pytest.mark.cluster
@pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install 'regard[submitit]'"
)
def test_rows_that_jobs_wrote_after_their_run_was_killed_are_taken(tmp_path):
    board = Board(tmp_path / "jobs" / "old")
    board.path.mkdir(parents=True)
    board.write(BUSY[0], BUSY[0].row(nll=42.0))
    board.write(BUSY[2], BUSY[2].row(status="failed", error="of old"))
    rows = {r["key"]: r for r in made("submitit", tmp_path).run([BUSY[0], BUSY[2]], LM)}
    assert len(rows) == 2 and rows[BUSY[0].key]["nll"] == 42.0
    assert rows[BUSY[2].key]["status"] == "ok" and board.stopped()


# Slurm, as far as one machine can play it


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent))
    from fake_slurm import install

    sys.path.pop(0)
    for name in ("bin", "slurm"):
        (tmp_path / name).mkdir()
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setattr(submitit, "OWN_PLACES", ())  # the folder of a test lies in /tmp
    monkeypatch.setattr(submitit, "VISIBLE", {"slurm": 1.0})
    monkeypatch.setattr(submitit, "ASK", 1.0)
    return tmp_path


@pytest.mark.cluster
@pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install 'regard[submitit]'"
)
def test_slurm_gets_an_array_with_what_was_asked_for(slurm, here):
    spec = "submitit:partition=gpu,account=me,mem=32GB,minutes=60,jobs=2"
    rows = small(slurm / "out", spec, ["needle"])
    assert rows == {key: row for key, row in here.items() if row["task"] == "needle"}
    (text,) = (path.read_text() for path in (slurm / "slurm").glob("*.job"))
    # a job for each task, and one for times
    for flag in ("partition=gpu", "account=me", "cpus-per-task=1", "mem=32GB", "time=60", "array=0-1%2"):
        assert f"#SBATCH --{flag}\n" in text
    assert "gpus" not in text


@pytest.mark.cluster
@pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install 'regard[submitit]'"
)
def test_a_folder_that_jobs_do_not_see_is_an_error_that_names_it(slurm, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_APART", "1")
    with pytest.raises(
        ValueError,
        match=r"a file system that all machines share \(folder='.*jobs', job='1000', state='FAILED'\)",
    ):
        list(Submitit(slurm / "jobs").run(BUSY[:1], LM))


# Wrong values


def test_folders_that_one_machine_has_for_itself_are_refused_under_slurm(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"all machines share; folder= names another \(folder='/dev/shm/x', file_system='tmpfs'\)",
    ):
        submitit.check_folder(Path("/dev/shm/x"), "slurm")
    with pytest.raises(ValueError, match=r"all machines share.*folder='/tmp/x'"):
        submitit.check_folder(Path("/tmp/x"), "slurm")
    submitit.check_folder(Path("/tmp/x"), "local")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="can be written to"):
        submitit.check_folder(tmp_path / "x", "local")


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [("submitt", KeyError, "no executor is called 'submitt'; near names: submitit"),
     ("submitit:partitoin=gpu", KeyError, "no setting of submitit is called 'partitoin'; near names: partition"),
     ("local:gpus=1", KeyError, "no setting of local is called 'gpus'"),
     ("submitit:cluster=pbs", ValueError, r"cluster is one of slurm, local \(cluster='pbs'\)"),
     ("submitit:cpus=0", ValueError, r"cpus is a whole number >= 1 \(cpus=0\)"),
     ("submitit:mem=lots", ValueError, r"\(budget='lots'\)"),
     ("ray:mem=8", ValueError, r'mem reads like "32GB" \(mem=8\)'),
     ("ray:workers=0", ValueError, r"workers >= 1 \(workers=0\)")],
)  # fmt: skip
def test_names_and_settings_are_checked(spec, error, said, tmp_path):
    with pytest.raises(error, match=said):
        executor_of(spec, workers=2, limit=60, out=tmp_path)


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_missing_package_is_an_error_that_names_the_extra_before_anything_is_written(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    said = CliRunner().invoke(app, ["compare", "--executor", name, "--out", str(tmp_path / "out")]).exception
    assert isinstance(said, ValueError) and f"pip install 'regard[{name}]'" in str(said)
    assert not (tmp_path / "out").exists()


def test_what_is_not_asked_for_is_not_imported():
    """A job or an actor hands cells and the loader on to its worker: transformers takes seconds to import."""
    code = "import sys, regard.bench.executors.ray, regard.bench.executors.shares as shares\n"
    code += "shares.Away(b'unpickled by the worker', 1, 1.0, {}, []).settle()\n"
    code += "assert 'transformers' not in sys.modules\n"
    code += "import regard.bench.compare; assert not {'ray', 'submitit'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'regard[ray]'")
def test_an_address_where_no_ray_answers_is_named():
    with pytest.raises(
        ValueError, match=r"a Ray cluster answers at the address \(address='127\.0\.0\.1:1'\)"
    ):
        list(Ray(1, "127.0.0.1:1").run(BUSY, LM))


def test_a_loaded_model_is_not_sent_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="give its path or name"):
        compare((object(), None), ["h2o"], ["needle"], [96], out=tmp_path / "out", executor="ray")


def test_jobs_of_two_runs_in_one_folder_do_not_meet(tmp_path):
    from regard.bench.executor import job_folder

    one, two = (job_folder(str(tmp_path), tmp_path / name / "run") for name in ("a", "b"))
    assert one != two and one.parent == two.parent == tmp_path and one.name.startswith("run-")
    assert job_folder(None, tmp_path / "run") == tmp_path / "run" / "jobs"
