"""Prompts that are read in part: what of it was read, where the time to the first token went, and from when it pays."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.sparse import is_sparse
from regard.bench.efficiency import crossing, interval
from regard.core import Method
from regard.tasks import Source

SHORTEST = 256  # tokens from which on a crossing is looked for
TURNS = 3  # how often method and model take turns at one length


def leaves_unread(method: Any) -> bool:
    """Whether a method leaves keys of a prompt unread: a mechanism that chooses blocks, or a mask page."""
    method = method.method if isinstance(method, Converted) else method
    return isinstance(method, Method) and (method.page.kind == "mask" or is_sparse(method))


def unread(runs: Sequence[Any]) -> dict[str, Any]:
    """The share of keys read and of attention mass captured: means, and by layer a list by head; layers left dense."""
    rows = [row for run in runs for row in run.selection]
    if not rows:
        return {}
    facts: dict[str, Any] = {"dense_layers": sorted({row["layer"] for row in rows if "dense" in row})}
    for key in ("kept", "mass"):
        layers: dict[int, list[list[float]]] = {}
        for row in rows:
            if key in row:
                layers.setdefault(row["layer"], []).append(row[key])
        means = {
            at: [round(statistics.mean(heads), 4) for heads in zip(*found)] for at, found in layers.items()
        }
        whole = [1.0] * len(facts["dense_layers"]) + [statistics.mean(heads) for heads in means.values()]
        facts[f"{key}_share"] = statistics.mean(whole) if means else None
        facts[f"{key}_by_layer"] = {str(at): means[at] for at in sorted(means)}
    return facts


def first_token_parts(runs: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of the prefill: choosing, attention over what was chosen, and the rest of the model."""
    parts = {
        name: statistics.median(run.parts.get(name, 0.0) for run in runs)
        for name in ("estimate", "attention")
    }
    whole = statistics.median(run.prefill for run in runs)
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    return {f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()}


def crossing_row(cell: Any, bench: Any) -> dict:
    """From which length on the first token comes sooner than with full attention, up to the cell's length."""
    start, method = time.perf_counter(), bench.method_of(cell)
    source = None if cell.text is None else Source.from_path(cell.text)
    points: dict[int, dict] = {}

    def measured(n: int) -> dict:
        sample = catalog.task(cell.task).samples(bench.tokenizer, n, 1, cell.seed, source=source, chat=False)[
            0
        ]
        return point(bench.model, method, sample.prompt[:n])

    for n in doublings(cell.length):
        points[n] = measured(n)
    found = crossing(points, lambda p: p["ratio"] < 1, measured)
    ends = interval(points, found)
    if ends and ends[1] is None:  # within the noise
        found, ends = None, None
    rows = [{"n": n, **points[n]} for n in sorted(points)]
    return cell.row(crossing=found, interval=ends, points=rows, seconds=time.perf_counter() - start)


def doublings(most: int) -> list[int]:
    """SHORTEST, twice that and so on, and the longest."""
    steps = int(math.log2(max(1, most / SHORTEST)))
    return sorted({min(SHORTEST, most), *(SHORTEST << i for i in range(1, steps + 1)), most})


def point(model: Any, method: Any, prompt: list[int]) -> dict[str, float]:
    """Milliseconds of a prefill and of the model's own in turns, and the ratio with its range."""
    tokens = torch.tensor([prompt], device=model.device)
    pairs = [(prefill(model, method, tokens), prefill(model, None, tokens)) for _ in range(TURNS + 1)][1:]
    ratios = sorted(ours / full for ours, full in pairs)
    ours, full = (1e3 * statistics.median(side) for side in zip(*pairs))
    return {
        "ms": ours,
        "full_ms": full,
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
    }


def prefill(model: Any, method: Any, tokens: torch.Tensor) -> float:
    """Seconds to the cache of a prompt and the logits after it."""
    with torch.inference_mode():
        start = time.perf_counter()
        if method is None:
            model(tokens, use_cache=True, logits_to_keep=1)
        else:
            with attach(model, method):
                model(tokens, use_cache=True, logits_to_keep=1)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        return time.perf_counter() - start
