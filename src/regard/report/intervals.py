"""Intervals of a quality relative to full attention, which answered the very same samples: drawn in pairs.

A sample that both get wrong, or both get right, says nothing about their ratio; intervals of the two by themselves
would count it twice.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from regard.report.words import clean, name, number, plural, shortened

DRAWS = 1000
FEW = 5  # of fewer samples a draw often repeats one, and the interval is little more than their range
WIDE = 0.5  # of full attention's quality

Row = Mapping[str, Any]


def scores(row: Row | None) -> np.ndarray | None:
    """[samples] the score of each, None where the row does not hold them."""
    known = [number(sample.get("score")) for sample in (row or {}).get("samples") or []]
    return None if not known or None in known else np.array(known, dtype=float)


@lru_cache(maxsize=64)
def picked(cell: str, samples: int) -> np.ndarray:
    """[DRAWS, samples] which samples each draw takes: the same for every method in a cell, another in another cell."""
    seed = int.from_bytes(hashlib.sha256(cell.encode()).digest()[:8])
    return np.random.default_rng(seed).integers(0, samples, (DRAWS, samples))


def drawn(row: Row, full: Row | None, base: float) -> np.ndarray | None:
    """[DRAWS] the cell's quality over `base`, full attention's, for samples drawn with replacement, the same for all.

    exact   with r = quality / base and sample scores s, f:  r + mean(s - r f) / base over the drawn ones. This is the
            ratio of the two means to first order, and finite where full attention is right on none of the drawn
    nll     exp(mean log s): a score is full attention's perplexity over the method's already
    """
    ours, theirs = scores(row), scores(full)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    picks = picked(f"{row['task']} {row['length']} {row.get('seed')}", len(ours))
    if row.get("metric") == "nll":
        with np.errstate(divide="ignore"):
            return np.exp(np.log(ours)[picks].mean(1)) / base
    ratio = row["quality"] / base
    apart = ours - ratio * theirs
    return ratio + (apart[picks].mean(1) - apart.mean()) / base


def interval(cells: Sequence[tuple[Row, Row | None, float]]) -> tuple[float | None, float | None]:
    """Of the mean over (the method's row, full attention's row, its quality): 95 % of the draws lie within.

    (None, None) where a cell does not hold its samples' scores.
    """
    draws = [made for made in (drawn(*facts) for facts in cells) if made is not None]
    if not draws or len(draws) < len(cells):
        return None, None
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return max(0.0, float(low)), float(high)


def interval_notes(rows: Sequence[Row], summary: Sequence[Row]) -> list[str]:
    """When the intervals, or the numbers they stand beside, say little."""
    notes = []
    least = min((len(r["samples"]) for r in rows if r.get("samples")), default=FEW)
    if least < FEW:
        notes.append(
            f"There are cells of {plural(least, 'sample')}: so few tell methods apart by chance, and their intervals "
            "are hardly any. Ask for more: --samples 8."
        )
    wide = [clean(name(r)) for r in summary if (r["quality_high"] or 0) - (r["quality_low"] or 0) > WIDE]
    if wide:
        notes.append(f"Wider than half of full quality, so undecided, is the interval of {shortened(wide)}.")
    return notes
