"""Executors by name: `executor_of("submitit:partition=gpu,minutes=60")`. They lie in `bench/executors/`."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from regard.bench.executors.base import (
    GUARD,
    Executor,
    Loader,
    WorkerBroken,
    guarded,
    main_kept_out,
    runs_again,
    script_text,
    why,
)
from regard.bench.executors.local import LocalProcesses, Worker, take_near, work
from regard.bench.executors.ray import Ray
from regard.bench.executors.submitit import JOBS, Submitit
from regard.bench.measuring import InProcess, safely
from regard.core import require, unknown
from regard.core.deprecation import moved
from regard.core.spec import parse_spec

__all__ = [
    "EXECUTORS",
    "GUARD",
    "Executor",
    "InProcess",
    "Loader",
    "LocalProcesses",
    "Ray",
    "Submitit",
    "Worker",
    "WorkerBroken",
    "executor_of",
    "guarded",
    "main_kept_out",
    "runs_again",
    "safely",
    "script_text",
    "take_near",
    "why",
    "work",
]

EXECUTORS = {"local": LocalProcesses, "submitit": Submitit, "ray": Ray}


def executor_of(spec: str, *, workers: int, limit: float, out: str | Path) -> Executor:
    """The executor that a text names, with its settings: "local", "ray:address=auto", "submitit:cluster=local,cpus=2".

    `workers` and `limit` hold where the text says nothing else; jobs of submitit lie in `out`/jobs, or in a folder of
    their own in `folder`. KeyError with the near names for another executor or setting.

    >>> executor_of("local:threads=4", workers=3, limit=60.0, out="runs")
    LocalProcesses(workers=3, threads=4, limit=60.0)
    """
    name, settings = parse_spec(spec)
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    known = settings_of(name)
    for key in settings:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
    made: dict[str, Any] = {"limit": limit, **settings}
    if name == "submitit":
        jobs = JOBS if made.get("cluster", "slurm") == "slurm" else workers
        made = {"jobs": jobs, **made, "folder": job_folder(settings.get("folder"), Path(out))}
    else:
        made = {"workers": workers, **made}
    executor = EXECUTORS[name](**made)
    if isinstance(executor, Submitit | Ray):
        executor.check()
    return executor


def settings_of(name: str) -> Sequence[str]:
    return [f.name for f in fields(EXECUTORS[name]) if not f.name.startswith("_")]


def job_folder(folder: Any, out: Path) -> Path:
    """Where the jobs of the run in `out` lie; in a folder that several runs share each has its own."""
    require(folder is None or isinstance(folder, str), "folder is a path", folder=folder)
    if folder is None:
        return out / "jobs"
    place = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:8]
    return Path(folder).expanduser() / f"{out.name}-{place}"


__getattr__ = moved(__name__, {"Broken": "regard.bench.executor:WorkerBroken"})
