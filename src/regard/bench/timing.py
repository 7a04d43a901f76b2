"""Times in pairs, and the rows that the speed benchmarks make of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

REPEATS = 7


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(ours: Callable[[], float], theirs: Callable[[], float], repeats: int = REPEATS) -> dict:
    """Alternate the two; median times, ratio of the medians, half the range of the ratio."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    mine, base = (statistics.median(x) for x in zip(*pairs))
    ratios = sorted(b / a for a, b in pairs)
    return dict(ratio=base / mine, spread=(ratios[-1] - ratios[0]) / 2, ms=1e3 * mine, baseline_ms=1e3 * base)


def row(case: str, times: dict, bound: float | None, target: float, note: str = "") -> dict:
    """A row of the table; `bound` is the least number of seconds that the bytes allow."""
    share = None if bound is None else bound / (times["ms"] / 1e3)
    holds = times["ratio"] >= target and (share is None or share >= 0.5)
    return {"case": case, **times, "of_bound": share, "target": target, "holds": holds, "note": note}
