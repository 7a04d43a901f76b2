"""Times in pairs within a limit, and the rows that the speed benchmarks make of them.

A benchmark ends within its limit on any CPU: repetitions become fewer as the time runs out, and a case for which none
is left is a row that says so.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from regard.ops.machine import cpu_facts

REPEATS = 7
# seconds of a whole benchmark, of a quick look; one case that was begun may go beyond
LIMIT, QUICK_LIMIT = 200.0, 40.0
SHARE = 0.2  # of the time left: what the repetitions of one case may take
END: ContextVar[float | None] = ContextVar("END", default=None)
OUT = "not measured: the time of this benchmark is used up"


@contextmanager
def within(limit: float) -> Iterator[None]:
    """What is timed in it has so many seconds, and no more than is left outside."""
    end = time.perf_counter() + min(limit, left())
    token = END.set(end)
    try:
        yield
    finally:
        END.reset(token)


def left() -> float:
    """Seconds that are left; infinity where there is no limit."""
    end = END.get()
    return math.inf if end is None else end - time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fitting(repeats: int, took: float) -> int:
    """How often something that took so long may be repeated: at least once."""
    room = SHARE * left() / max(took, 1e-9)
    return repeats if room >= repeats else max(1, int(room))


def typical(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds, after a first time that does not count; NaN where no time is left."""
    if left() <= 0:
        return math.nan
    took = seconds(work)
    return statistics.median(seconds(work) for _ in range(fitting(repeats, took)))


def least(work: Callable[[], Any], repeats: int) -> float:
    """The least seconds of some runs, after one that does not count: what else the machine does only adds.

    NaN where no time is left.
    """
    if left() <= 0:
        return math.nan
    took = seconds(work)
    return min(seconds(work) for _ in range(fitting(max(2, repeats), took)))


def paired(ours: Callable[[], float], theirs: Callable[[], float], repeats: int = REPEATS) -> dict:
    """Alternate the two; median times, ratio of the medians, half the range of the ratio. NaN where no time is left."""
    if left() <= 0:
        return unmeasured()
    took = seconds(lambda: (ours(), theirs()))
    pairs = [(ours(), theirs()) for _ in range(fitting(repeats, took))]
    mine, base = (statistics.median(x) for x in zip(*pairs))
    ratios = sorted(b / a for a, b in pairs)
    return dict(ratio=base / mine, spread=(ratios[-1] - ratios[0]) / 2, ms=1e3 * mine, baseline_ms=1e3 * base)


def unmeasured() -> dict:
    return dict.fromkeys(("ratio", "spread", "ms", "baseline_ms"), math.nan)


def row(case: str, times: dict, bound: float | None, target: float, note: str = "") -> dict:
    """A row of the table; `bound` is the least number of seconds that the bytes allow."""
    share = None if bound is None else bound / (times["ms"] / 1e3)
    holds = times["ratio"] >= target and (share is None or share >= 0.5)
    note = "; ".join(filter(None, (OUT if math.isnan(times["ratio"]) else "", note)))
    return {"case": case, **times, "of_bound": share, "target": target, "holds": holds, "note": note}


def failed(case: str, target: float, error: Exception) -> dict:
    """The row of a page that raised: nothing was measured, and its note is the error."""
    return {**row(case, unmeasured(), None, target), "note": f"{type(error).__name__}: {error}"}


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of a large matrix product."""
    a, out = torch.ones(size, size, dtype=dtype), torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(3))


def copy_bandwidth(size: int = 128 << 20) -> float:
    """Bytes per second, read and written."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(3))


def fresh(size: int) -> float:
    """Seconds that the first touch of a new tensor of this many bytes takes: the system's part of any output."""
    return statistics.median(seconds(lambda: torch.zeros(size, dtype=torch.uint8)) for _ in range(3))


def with_cpu(rows: list[dict]) -> list[dict]:
    """The rows with the CPU that they were measured on: "cpu", its name, and "multiplies_bf16"."""
    facts = cpu_facts()
    return [{**row, "cpu": facts["cpu"], "multiplies_bf16": facts["multiplies_bf16"]} for row in rows]
