"""What a method's prefill and steps take beside full attention's: measured once for a method, budget and length."""

import statistics
import time
from typing import Any

import numpy as np

from regard.attaching.converted import Converted
from regard.bench.prefill import first_token_parts, leaves_unread
from regard.tasks import Sample, held_out
from regard.tasks.base import first_token

TURNS = 2  # how often method and full attention take turns on one sequence
STEPS = 16  # tokens that are decoded in a turn


def timing_row(cell: Any, bench: Any) -> dict:
    """The row of a "timing" cell: a text of the cell's length, then STEPS tokens, in turns with full attention.

    Of a task of one's own the text is as long as its longest question.

    "calibration_s" is what finding the settings that a target asks for took, before.
    """
    start, method = time.perf_counter(), bench.method_of(cell)
    length = cell.length or max(len(sample.prompt) for sample in bench.samples(cell))
    facts = paired_times([running_text(cell, length, bench)], method, bench)
    if isinstance(method, Converted) and "target" in cell.settings:
        facts["calibration_s"] = bench.calibration(cell)
    return cell.row(**facts, length=length, seconds=time.perf_counter() - start)


def running_text(cell: Any, length: int, bench: Any) -> Sample:
    """`length` tokens of the text and STEPS after them; a shorter text is read again from its start."""
    source, head = bench.source(cell) or held_out(), first_token(bench.tokenizer)
    ids = source.ids(bench.tokenizer)
    tokens = length + STEPS - len(head)
    row = [*head, *(ids * (tokens // len(ids) + 1))[:tokens]]
    return Sample(row[:length], row[length:], evidence=(0, 0))


def paired_times(samples: list[Sample], method: Any, bench: Any) -> dict:
    """Method and full attention in turns on the same sequence; ratios with their spread."""
    full, ours = [], []
    for _ in range(TURNS):
        full.append(bench.run(samples, None))
        ours.append(bench.run(samples, method) if method is not None else full[-1])
    steps = [np.median(r.steps) for r in ours], [np.median(r.steps) for r in full]
    prefills = [r.prefill for r in ours], [r.prefill for r in full]
    facts = {}
    for name, (mine, theirs) in (("decode", steps), ("prefill", prefills)):
        ratios = np.array(mine) / np.array(theirs)
        facts |= {
            f"{name}_ms": 1e3 * float(np.median(mine)),
            f"{name}_ratio": float(np.exp(np.log(ratios).mean())),
            f"{name}_spread": float((ratios.max() - ratios.min()) / 2),
        }
    if method is not None and leaves_unread(method):
        facts |= first_token_parts(ours)
    elif method is not None:
        scoring = [r.parts.get("scoring", 0.0) for r in ours]
        facts |= {"scoring_ms": 1e3 * statistics.median(scoring)}
    return facts
