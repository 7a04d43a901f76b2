"""Actors of Ray, one for each worker, asked cell by cell: on a cluster of its own here, or on one at an address."""

import logging
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regard.bench.cell import Cell
from regard.bench.executors.base import Away, Loader, WorkerBroken, memory_bytes, optional, variables
from regard.bench.executors.local import Steady, take_near
from regard.core import require

PATIENCE = 180.0  # seconds without a worker, after which it is said what they wait for
COLOUR = "\x1b\\[[0-9]*m"  # in Ray's messages
KNOCK = 10.0  # seconds in which the address of a cluster answers
# Ray has workers give way to all else (nice 15): beside two busy cores one took 145 seconds to begin
OWN = {"worker_niceness": 0}
STORE = 100 * 2**20  # bytes of a cluster of its own for what is passed around: cells and rows are small


class Measurer:
    """What an actor is: a worker process of its machine, and the words for what becomes of it."""

    def __init__(self, away: Away) -> None:
        self.away = away

    def load(self) -> str:
        """Load the model; the machine's name."""
        self.steady = Steady(self.away.settle(), self.away.threads, self.away.limit)
        return os.uname().nodename

    def measure(self, cell: Cell) -> dict:
        return {**self.steady.measure(cell), "host": os.uname().nodename}


class Actor:
    """An actor and what it is busy with."""

    def __init__(self, remote: Any, away: Away) -> None:
        self.handle = remote.remote(away)
        self.ref = self.handle.load.remote()  # what is awaited of it
        self.cell: Cell | None = None
        self.last: tuple[str, int, int] | None = None
        self.ready = False

    def assign(self, cell: Cell) -> None:
        self.cell, self.ref = cell, self.handle.measure.remote(cell)

    @property
    def idle(self) -> bool:
        return self.ready and self.cell is None


@dataclass
class Ray:
    """`workers` actors with `cpus`, `gpus` and `mem` ("8GB") each, on the cluster at `address` or one of its own.

    address  "auto", "HOST:PORT" or "ray://HOST:PORT"; None: $RAY_ADDRESS, or a cluster on this machine for this run
    limit    seconds a cell may take
    """

    workers: int = 2
    address: str | None = None
    cpus: int = 1
    gpus: float = 0
    mem: str | None = None
    limit: float = 600.0

    def __post_init__(self) -> None:
        for name, low in (("workers", 1), ("cpus", 1), ("gpus", 0)):
            value = getattr(self, name)
            require(isinstance(value, int | float) and value >= low, f"{name} >= {low}", **{name: value})
        if self.mem is not None:
            memory_bytes(self.mem)

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]:
        ray, left = optional("ray"), list(cells)[::-1]
        away = Away.from_here(load, self.cpus, self.limit)
        with self.connected(ray):
            remote = ray.remote(Measurer).options(**self.options())
            crew = [Actor(remote, away) for _ in range(min(self.workers, len(left)))]
            try:
                yield from self.rows(ray, crew, left, lambda: Actor(remote, away))
            finally:
                for actor in crew:
                    ray.kill(actor.handle)

    def rows(self, ray: Any, crew: list[Actor], left: list[Cell], new: Callable[[], Actor]) -> Iterator[dict]:
        """A row for each cell that is left, as they end; an actor that is lost is replaced."""
        began, lost = time.monotonic(), 0
        while left or any(actor.cell for actor in crew):
            for actor in crew:
                if actor.idle and left:
                    actor.assign(take_near(left, actor))
            for i in answered(ray, crew):
                row, gone = self.received(ray, crew[i])
                if row is not None:
                    yield row
                if gone:
                    lost = lost + 1 if row is None else 0
                    require_loaded(lost, gone)
                if gone and left:
                    crew[i] = new()
            began = self.say_waiting(ray, crew, began)

    def check(self) -> None:
        """Refuse, before any work, a machine without Ray."""
        optional("ray")

    def options(self) -> dict[str, Any]:
        """What each actor asks of its machine. Nothing is tried twice in silence: a lost cell is a row."""
        asked: dict[str, Any] = dict(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0, max_task_retries=0
        )
        if self.mem is not None:
            asked["memory"] = memory_bytes(self.mem)
        if self.where and variables():
            asked["runtime_env"] = {"env_vars": variables()}
        return asked

    @property
    def where(self) -> str | None:
        return self.address or os.environ.get("RAY_ADDRESS")

    @contextmanager
    def connected(self, ray: Any) -> Iterator[None]:
        """Within the block there is a cluster: one this process is connected to, that at the address, or its own."""
        if ray.is_initialized():
            yield
            return
        quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
        if self.where:
            reach(ray, self.where, quiet)
        else:
            cpus, gpus = math.ceil(self.workers * self.cpus), math.ceil(self.workers * self.gpus)
            ray.init(address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False,
                     object_store_memory=STORE, _system_config=OWN, **quiet)  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()

    def received(self, ray: Any, actor: Actor) -> tuple[dict | None, str]:
        """(row, why the actor is gone or ""): what was awaited of it."""
        try:
            answer = ray.get(actor.ref)
        except ray.exceptions.RayActorError as error:
            cell, actor.cell, actor.ref, actor.ready = actor.cell, None, None, False
            why = " ".join(re.sub(COLOUR, "", str(error)).split())
            return (None if cell is None else cell.row(**loss(why))), why
        except ray.exceptions.RayTaskError as error:
            raise WorkerBroken(str(error.cause)) from error
        if not actor.ready:
            actor.ready, actor.ref = True, None
            return None, ""
        actor.cell, actor.ref = None, None
        return answer, ""

    def say_waiting(self, ray: Any, crew: list[Actor], began: float) -> float:
        """A warning, once, where no worker starts: what each asks for and what the cluster has."""
        if time.monotonic() > began + PATIENCE and not any(a.ready for a in crew):
            has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU", "memory")}
            asked = dict(cpus=self.cpus, gpus=self.gpus, mem=self.mem)
            text = f"no worker has started in {PATIENCE:g} s: each asks for {asked}, the cluster has {has}"
            warnings.warn(text, stacklevel=2)
            return float("inf")
        return began


def reach(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    """Connect to a cluster; ValueError with the address where none answers there.

    A port is knocked at first: Ray itself tries for minutes, and then may end the process.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"must hold: a Ray cluster answers at the address (address={address!r}): {first}"
        ) from error


def answered(ray: Any, crew: list[Actor]) -> list[int]:
    """The actors of which what is awaited has come, or failed."""
    refs = [actor.ref for actor in crew if actor.ref is not None]
    done = set(ray.wait(refs, num_returns=1, timeout=1.0)[0])
    return [i for i, actor in enumerate(crew) if actor.ref in done]


def loss(why: str) -> dict:
    """Status and error of a cell whose actor ended in it."""
    error = f"its worker was killed or its machine lost in this cell: {why[:300]}"
    return dict(
        status="memory" if "memory" in why.lower() and "OOM killer" not in why else "failed", error=error
    )


def require_loaded(lost: int, why: str) -> None:
    """An actor that is lost before its first cell is replaced once; two in a row end the run."""
    if lost > 1:
        raise WorkerBroken(f"while the model was loading: {why[-300:]}")
