"""Jobs of Slurm, through submitit: an array of jobs, whose rows come back in any order through a shared folder."""

import math
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regard.bench.cell import Cell
from regard.bench.executors.base import Away, Loader, WorkerBroken, memory_bytes, optional
from regard.bench.executors.shares import Board, measure_share, shares
from regard.core import require
from regard.report.folder import writable

CLUSTERS = ("slurm", "local")
JOBS = 16
LOGS = "logs"
# what no other machine sees
OWN_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
OWN_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
# seconds: between looks, until a file that another machine wrote is there, between questions for the jobs' states
LOOK, VISIBLE, ASK = 0.5, {"slurm": 30.0, "local": 1.0}, 30.0


@dataclass
class Job:
    """A share that is with the cluster."""

    cells: list[Cell]  # without a row so far
    board: Board
    handle: Any
    begins: int = 0  # how often a job for it ended before its first cell
    rows: int = 0
    ended: float | None = None  # when it was seen to have ended

    def collect(self) -> Iterator[dict]:
        """Rows that are new."""
        self.board.refresh()
        for cell in list(self.cells):
            if (row := self.board.row(cell)) is not None:
                self.cells.remove(cell)
                self.rows += 1
                yield row

    def finished(self, patience: float) -> bool:
        """Whether nothing more comes of it: it has ended, and what it wrote has had the time to be seen."""
        if self.ended is None and self.handle.done():
            self.ended = time.monotonic()
        late = self.ended is not None and time.monotonic() > self.ended + patience
        return self.ended is not None and (late or (self.result.exists() and not self.cells))

    @property
    def result(self) -> Path:
        return self.handle.paths.result_pickle


@dataclass
class Submitit:
    """Jobs on `cluster`, at most `jobs` at once: "slurm", or "local" for processes of this machine.

    folder     where jobs and this process meet, on a file system that all machines share
    partition, account, cpus, gpus, mem ("32GB") and minutes are those of each job; minutes None: enough for its cells
    limit      seconds a cell may take
    """

    folder: str | Path
    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    cpus: int = 1
    gpus: int = 0
    mem: str | None = None
    minutes: int | None = None
    jobs: int = JOBS
    limit: float = 600.0
    _asked: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.cluster in CLUSTERS, f"cluster is one of {', '.join(CLUSTERS)}", cluster=self.cluster)
        least = dict(
            cpus=(self.cpus, 1), gpus=(self.gpus, 0), jobs=(self.jobs, 1), minutes=(self.minutes or 1, 1)
        )
        for name, (value, low) in least.items():
            require(
                type(value) is int and value >= low, f"{name} is a whole number >= {low}", **{name: value}
            )
        if self.mem is not None:
            memory_bytes(self.mem)

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]:
        self.check()
        executor = self.opened(optional("submitit"), cells)
        rows = earlier(Path(self.folder), cells)
        yield from rows
        known = {row["key"] for row in rows}
        away = Away.from_here(load, self.cpus, self.limit)
        waiting = [(share, 0) for share in shares([c for c in cells if c.key not in known], self.jobs)]
        running: list[Job] = []
        try:
            while waiting or running:
                # an array of Slurm waits in its queue; on this machine all jobs would start at once
                room = len(waiting) if self.cluster == "slurm" else self.jobs - len(running)
                running += self.submitted(executor, waiting[:room], away)
                del waiting[:room]
                time.sleep(LOOK)
                self.ask(running)
                for job in list(running):
                    yield from job.collect()
                    if job.finished(VISIBLE[self.cluster]):
                        running.remove(job)
                        yield from self.close(job, waiting)
        finally:
            self.stop(running)

    def check(self) -> None:
        """Refuse, before any work, a machine without submitit or Slurm, and a folder that cannot be used."""
        optional("submitit")
        check_folder(Path(self.folder), self.cluster)
        if self.cluster == "slurm":
            there = shutil.which("sbatch") and shutil.which("srun")
            rule = "cluster=slurm is where sbatch and srun are; cluster=local runs jobs on this machine"
            require(there, rule, cluster=self.cluster)

    def opened(self, submitit: Any, cells: Sequence[Cell]) -> Any:
        """submitit's executor, with what each job asks for."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(folder / LOGS, cluster=self.cluster)
        asked = dict(
            name="regard", timeout_min=self.time(cells), cpus_per_task=self.cpus, gpus_per_node=self.gpus or None,
            mem_gb=None if self.mem is None else memory_bytes(self.mem) / 1e9, slurm_partition=self.partition,
            slurm_account=self.account, slurm_array_parallelism=self.jobs,
        )  # fmt: skip
        executor.update_parameters(**{name: value for name, value in asked.items() if value is not None})
        return executor

    def time(self, cells: Sequence[Cell]) -> int:
        """Minutes of a job: those asked for, or enough for all cells of the largest share and a load of the model."""
        most = max((len(share) for share in shares(cells, self.jobs)), default=1)
        return self.minutes or math.ceil(most * self.limit / 60) + 10

    def submitted(self, executor: Any, waiting: list[tuple[list[Cell], int]], away: Away) -> list[Job]:
        """Jobs of these shares, as one array."""
        if not waiting:
            return []
        boards = [Board((Path(self.folder) / uuid.uuid4().hex[:12]).absolute()) for _ in waiting]
        for board in boards:
            board.path.mkdir()
        given, minutes = (
            [share for share, _ in waiting],
            self.time([c for share, _ in waiting for c in share]),
        )
        handles = executor.map_array(
            measure_share, [b.path for b in boards], given, [away] * len(given), [minutes] * len(given)
        )
        return [
            Job(list(share), board, handle, begins)
            for (share, begins), board, handle in zip(waiting, boards, handles)
        ]

    def ask(self, running: list[Job]) -> None:
        """One question for the states of all jobs, now and then: that one was killed shows nowhere else."""
        if running and time.monotonic() > self._asked + ASK:
            self._asked = time.monotonic()
            running[0].handle.done(force_check=True)

    def close(self, job: Job, waiting: list[tuple[list[Cell], int]]) -> Iterator[dict]:
        """What is to be done after a job's end: rows of the cells that were lost with it; the others wait again."""
        if job.result.exists():
            failed = job.handle.exception()
            if failed is not None:
                raise WorkerBroken(reason(str(failed)))
            lost = []
        else:
            lost = [cell for cell in job.cells if job.board.begun(cell)]
            job.board.stop()  # of a job whose head was killed, the rest may live on
            if not lost and not job.rows:
                self.check_loss(job)
        missing = [c for c in job.cells if c not in lost]
        if job.result.exists() and missing and job.handle.result() == "done":
            unseen(job, self.folder)
        for cell in lost:
            yield cell.row(**loss(job))
        if missing:
            waiting.append((missing, job.begins + (not lost and not job.rows)))

    def check_loss(self, job: Job) -> None:
        """A job that ended before its first cell: told where nothing of it is to be seen, or where it is the second."""
        if not job.handle.paths.stdout.exists() and not job.handle.paths.stderr.exists():
            unseen(job, self.folder)
        if job.begins:
            log = (job.handle.stderr() or job.handle.stdout() or "nothing").strip()[-300:]
            raise WorkerBroken(
                f"two jobs ended while the model was loading (the last: {job.handle.job_id}, state "
                f"{job.handle.state}); its log ends with: {log}"
            )

    def stop(self, running: list[Job]) -> None:
        """End what still runs, and on this machine see it ended."""
        for job in running:
            job.board.stop()
            job.handle.cancel(check=False)
        until = time.monotonic() + 10
        while (
            self.cluster == "local" and time.monotonic() < until and not all(j.handle.done() for j in running)
        ):
            time.sleep(0.05)


def loss(job: Job) -> dict:
    """Status and error of a cell whose job ended in it."""
    state = job.handle.state
    log = job.handle.paths.stderr
    error = f"its job {job.handle.job_id} was killed or lost in this cell (state {state}); its log is {log}"
    return dict(status="memory" if "OUT_OF_ME" in state else "failed", error=error)


def reason(trace: str) -> str:
    """The error of a worker or a job, out of submitit's report: its last line that is one."""
    lines = [line.strip() for line in trace.splitlines() if "Error" in line or "WorkerBroken" in line]
    errors = [line for line in lines if not line.startswith(("raise", "File", "Traceback"))]
    last = errors[-1] if errors else trace.strip()
    return last.removeprefix(f"{WorkerBroken.__module__}.WorkerBroken: ")


def unseen(job: Job, folder: str | Path) -> None:
    """The error for a job of which less is to be seen than it has done."""
    rule = "jobs and this process see one folder; it is on a file system that all machines share"
    require(False, rule, folder=str(folder), job=job.handle.job_id, state=job.handle.state)


def earlier(folder: Path, cells: Sequence[Cell]) -> list[dict]:
    """Rows that jobs of an earlier start wrote after it was killed; what of these jobs still runs is told to stop."""
    boards = [Board(path) for path in folder.iterdir() if path.is_dir() and path.name != LOGS]
    for board in boards:
        board.stop()
    rows = [row for cell in cells for board in boards if (row := board.row(cell)) is not None]
    return list({row["key"]: row for row in rows if row["status"] == "ok"}.values())


def check_folder(folder: Path, cluster: str) -> None:
    """Refuse a folder that cannot be written to or, under Slurm, that other machines cannot see."""
    writable(folder)
    if cluster == "slurm":
        path, system = folder.absolute(), file_system(folder.absolute())
        own = system in OWN_SYSTEMS or any(path.is_relative_to(place) for place in OWN_PLACES)
        rule = "the jobs' folder is on a file system that all machines share; folder= names another"
        require(not own, rule, folder=str(folder), file_system=system)


def file_system(path: Path) -> str:
    """The kind of file system a path lies on, such as "ext4" or "nfs4"; "unknown" where Linux does not tell."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return "unknown"
    found = [
        (line.split()[4], line.partition(" - ")[2].split()[0]) for line in mounts.read_text().splitlines()
    ]
    above = [(len(Path(place).parts), kind) for place, kind in found if path.resolve().is_relative_to(place)]
    return max(above, key=lambda pair: pair[0])[1] if above else "unknown"
