"""Efficiency length: from how many tokens on a mechanism takes less time, or less memory, than full attention.

After CAB (Zhang et al., 2022), which fits curves and reads off where they cross; here the crossing is found by
bisection on lengths that are run. At every length the mechanism and torch's SDPA take turns in one process: forward,
and forward with backward, batch 1, 8 heads of width 64, float32, on the CPU. The efficiency length is the smallest
length tested at which the mechanism is below, and at all longer ones tested too. Its interval ends at the longest
length at which no repetition, and the shortest from which on every repetition, was below; where there is no such
shortest length the two are equal within the noise, and there is no efficiency length.

Memory is the most that tensors hold at a time beyond the inputs, from the allocations and frees that torch's profiler
records: exact, so it has no interval. It is compared with SDPA, and with softmax attention through explicit weights.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from regard import catalog
from regard.bench.timing import left, within
from regard.core import Method, require, unknown
from regard.core.deprecation import moved, renamed
from regard.core.shapes import PATTERNS
from regard.kinds.mechanism import Mechanism, make_call
from regard.testing.case import Case

BATCH, HEADS, WIDTH = 1, 8, 64
LEAST, REPEATS = 64, 3
LONG = 2.0  # seconds from which a run is repeated once less
UNFUSED = 4_096  # explicit weights of 8 heads hold half a gigabyte here
PATIENCE = 1.0  # seconds beyond which a run must promise to be faster than SDPA
# seconds beyond which a mechanism that is faster than SDPA already is not asked for more
ENOUGH = 4.0
ROOM = 4e9  # bytes that a run may hold
PASSES = ("forward", "forward and backward")
Work = Callable[[], Any]


@dataclass
class Point:
    """What was measured at one length: seconds of each repetition, and bytes held at the peak."""

    seconds: list[float]
    held: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Workload:
    """One pattern and one pass, to be timed at any length; full attention is measured once at each."""

    pattern: str
    backward: bool
    fused: dict[int, Point] = field(default_factory=dict)
    explicit: dict[int, int] = field(default_factory=dict)

    def inputs(self, n: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(n)
        made = (torch.randn(BATCH, HEADS, n, WIDTH, generator=g) for _ in range(3))
        return [t.requires_grad_(self.backward) for t in made]

    def work(self, run: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
        """One pass of run() as something to time."""
        if not self.backward:
            return torch.no_grad()(run)
        return lambda: torch.autograd.grad(run().sum(), leaves, allow_unused=True)

    def sdpa(self, n: int) -> Work:
        q, k, v = self.inputs(n)
        causal = self.pattern == "causal_self"
        return self.work(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v])

    def unfused(self, n: int) -> int:
        """Bytes that attention through all its weights holds."""
        if n not in self.explicit:
            q, k, v = self.inputs(n)
            sees = torch.ones(n, n, dtype=torch.bool)
            sees = sees.tril() if self.pattern == "causal_self" else sees

            def run() -> Tensor:
                return (q @ k.mT * WIDTH**-0.5).masked_fill(~sees, -torch.inf).softmax(-1) @ v

            self.explicit[n] = bytes_held(self.work(run, [q, k, v]))
        return self.explicit[n]

    def mechanism(self, page: Mechanism, n: int) -> Work:
        q, k, v = self.inputs(n)
        method = Method(page.card.title, page, page.config())
        cfg = method.config
        dims = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": HEADS * WIDTH}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            params = page.init(cfg, dims) if page.init else {}
            x = torch.randn(BATCH, n, HEADS * WIDTH) if page.reads_x(cfg) else None
        params = {
            name: p.detach().requires_grad_(self.backward and p.is_floating_point())
            for name, p in params.items()
        }
        leaves = [q, k, v, *(p for p in params.values() if p.requires_grad)]
        if x is not None:
            leaves.append(x.requires_grad_(self.backward))
        both = (x, x) if x is not None and "cross" in self.pattern else x
        roles = Case(page, cfg, self.pattern).labels(n)
        call = make_call(method, q, k, v, pattern=self.pattern, params=params, x=both, roles=roles)
        path = page.fast or page.reference
        return self.work(lambda: path(q, k, v, cfg, call)[0], leaves)


def bytes_held(work: Work) -> int:
    """The most bytes that tensors made by work() hold at a time, from torch's profiler."""
    gc.collect()  # nothing older is freed meanwhile
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()  # what it returns counts until here
    del kept
    level = peak = 0
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler's own lines on the error stream are left out."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def seconds(work: Work) -> float:
    """Seconds of one run; of a short one the mean of as many as fill five milliseconds."""
    start, runs = time.perf_counter(), 0
    while True:
        work()
        runs += 1
        took = time.perf_counter() - start
        if took >= 5e-3:
            return took / runs


def measured(workload: Workload, page: Mechanism, n: int) -> dict[str, Any]:
    """The row of one length: both sides in turns; full attention that takes long is timed once for all mechanisms."""
    ours, theirs = workload.mechanism(page, n), workload.sdpa(n)
    held = bytes_held(ours)  # warms up too
    if n not in workload.fused:
        workload.fused[n] = Point([], bytes_held(theirs))
    base = workload.fused[n]
    again, pairs = not base.seconds or base.median < 0.1, []
    while len(pairs) < REPEATS - (bool(pairs) and max(pairs[0]) > LONG):
        mine = seconds(ours)
        pairs.append((mine, seconds(theirs) if again else base.seconds[len(pairs) % len(base.seconds)]))
    if again:
        base.seconds = [b for _, b in pairs]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "n": n, "ms": 1e3 * statistics.median(a for a, _ in pairs), "sdpa_ms": 1e3 * base.median,
        "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "held": held, "sdpa_held": base.held,
        "unfused_held": workload.unfused(n) if n <= UNFUSED else None,
    }  # fmt: skip


def climb(workload: Workload, page: Mechanism, most: int) -> tuple[dict[int, dict], str]:
    """Points at doublings of LEAST up to `most`, and why it stopped before."""
    points: dict[int, dict] = {}
    n = LEAST
    while n <= most:
        points[n] = measured(workload, page, n)
        if 2 * n <= most and (why := stop_reason(points, n)):
            return points, why
        if 2 * n <= most and left() <= 0:
            return points, f"its share of the benchmark's time was used up at {n} tokens"
        n *= 2
    return points, ""


def stop_reason(points: dict[int, dict], n: int) -> str:
    """Why the next doubling is left out: it would be slow and tell nothing new, or hold too much."""
    before, now = points.get(n // 2, points[n]), points[n]
    growth = {key: min(4.0, max(2.0, now[key] / before[key])) for key in ("ms", "sdpa_ms", "held")}
    took, bound = (now[key] * growth[key] / 1e3 for key in ("ms", "sdpa_ms"))
    if took > max(PATIENCE, bound) or (took > ENOUGH and now["ms"] < now["sdpa_ms"]):
        return f"{2 * n} tokens would take {took:.1f} s, SDPA {bound:.1f} s"
    held = now["held"] * growth["held"]
    return f"{2 * n} tokens would hold {held / 1e9:.1f} GB" if held > ROOM else ""


def crossing(
    points: dict[int, dict], below: Callable[[dict], bool | None], measure_at: Callable[[int], dict]
) -> int | None:
    """The smallest length tested from which on `below` holds at every length tested; None: not at the longest.

    Between the doublings it bisects down to an eighth of one, in geometric means: steps of the square root of two,
    then of its square root, then of that one's.
    """
    tested = sorted(n for n, p in points.items() if below(p) is not None)
    start = first(points, below)
    if start is None or start == tested[0]:
        return start
    low, high = max(n for n in tested if n < start), start
    for _ in range(3):
        if left() <= 0:
            break
        middle = round((low * high) ** 0.5)
        points[middle] = points.get(middle) or measure_at(middle)
        low, high = (low, middle) if below(points[middle]) else (middle, high)
    return first(points, below)


def first(points: dict[int, dict], below: Callable[[dict], bool | None]) -> int | None:
    length = None
    for n in sorted(points, reverse=True):
        if (holds := below(points[n])) is None:
            continue
        if not holds:
            break
        length = n
    return length


def interval(points: dict[int, dict], length: int | None) -> list[int | None] | None:
    """[the longest length below `length` where no repetition was faster, the shortest from which on all were]."""
    if length is None:
        return None
    slower = [n for n, p in points.items() if n <= length and p["low"] > 1]
    return [max(slower, default=None), first(points, lambda p: p["high"] < 1)]


def lengths(workload: Workload, name: str, page: Mechanism, most: int) -> dict[str, Any]:
    """The row of one mechanism and one pass."""
    row: dict[str, Any] = {"mechanism": name, "pattern": workload.pattern, "pass": PASSES[workload.backward]}
    row |= {"path": "fast" if page.fast else "reference"}
    points, why = climb(workload, page, most)
    top = points[max(points)]

    def measure_at(n: int) -> dict:
        return measured(workload, page, n)

    crossed = crossing(points, lambda p: p["ratio"] < 1, measure_at)
    ends = interval(points, crossed)
    if ends and ends[1] is None:
        crossed, ends = None, None
        why = (
            why
            or f"within the noise of SDPA: {top['low']:.2f} to {top['high']:.2f} of its time at {top['n']}"
        )
    row |= {"time": crossed, "time_interval": ends}
    row["memory"] = crossing(points, lambda p: p["held"] < p["sdpa_held"], measure_at)
    row["memory_unfused"] = crossing(
        points, lambda p: None if p["unfused_held"] is None else p["held"] < p["unfused_held"], measure_at
    )
    row |= {"least": LEAST, "most": top["n"], "faster_at_most": 1 / top["ratio"], "note": why}
    row["points"] = [points[n] for n in sorted(points)]
    return row


@renamed(told="progress")
def efficiency(
    names: list[str] | None = None,
    pattern: str = "causal_self",
    most: int = 16_384,
    progress: Callable[[str], None] | None = None,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """Two rows for each mechanism that can do the pattern, forward and forward with backward.

    time, memory, memory_unfused: the efficiency length against SDPA in time and memory, against explicit weights in
    memory; None where there is none up to `most` of the row, the longest length that was run. In `limit` seconds every
    row has an equal share of what is left: a row that it ended says so.
    """
    if pattern not in PATTERNS:
        raise unknown("pattern", pattern, PATTERNS)
    able = catalog.list_methods(kind="mechanism", pattern=pattern)
    for name in names or ():
        require(name in able or catalog.get(name) is None, f"a mechanism that does {pattern}", name=name)
    require(most >= 2 * LEAST, f"most >= {2 * LEAST}", most=most)
    rows, workloads = [], [Workload(pattern, backward) for backward in (False, True)]
    gc.freeze()  # what is there already is not looked through at every measurement
    asked = [(name, workload) for name in names or able for workload in workloads]
    with within(limit):
        for i, (name, workload) in enumerate(asked):
            start = time.perf_counter()
            with within(max(0.0, left()) / (len(asked) - i)):
                rows.append(attempt(workload, name, most))
            if progress:
                progress(f"{name}, {PASSES[workload.backward]}: {time.perf_counter() - start:.0f} s")
    gc.unfreeze()
    return rows


def attempt(workload: Workload, name: str, most: int) -> dict[str, Any]:
    """The row, or why there is none: a mechanism that cannot be run at this width does not end the others."""
    try:
        return lengths(workload, name, catalog.get(name), most)
    except Exception as error:
        row = {"mechanism": name, "pattern": workload.pattern, "pass": PASSES[workload.backward]}
        return row | {"note": f"failed: {type(error).__name__}: {error}", "points": []}


def shown(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows in words, for a table: a length, or "none up to N"."""

    def length_text(row: dict, key: str, most: int | None = None) -> str:
        if "most" not in row:
            return "–"
        if row[key] is None:
            return f"none up to {min(row['most'], most or row['most'])}"
        return f"{'≤ ' if row[key] == row['least'] else ''}{row[key]}"

    def within(row: dict) -> str:
        ends = row.get("time_interval") or [None, None]
        return f" ({ends[0] or row['least']}–{ends[1]})" if row.get("time") else ""

    return [
        {
            "mechanism": row["mechanism"],
            "pass": row["pass"],
            "time": length_text(row, "time") + within(row),
            "memory": length_text(row, "memory"),
            "memory, unfused": length_text(row, "memory_unfused", UNFUSED),
            "faster": f"{row['faster_at_most']:.2g}× at {row['most']}" if "most" in row else "",
            "note": row["note"],
        }
        for row in rows
    ]


__getattr__ = moved(__name__, {"Bench": "regard.bench.efficiency:Workload"})
