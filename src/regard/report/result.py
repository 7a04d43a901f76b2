"""What `regard compare` found: one row of data per cell, and what can be said about the methods from them."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regard.report.floor import FLOOR, at_floor, floor_notes, places
from regard.report.intervals import interval, interval_notes
from regard.report.notebook import notebook_html
from regard.report.sentence import cost, no_winner_text, winner_text
from regard.report.words import (
    KEEPS,
    budget_order,
    budget_text,
    clean,
    listing,
    name,
    number,
    plural,
    scope_text,
    shortened,
)

Row = Mapping[str, Any]
PARTS = ("estimate_ms", "attention_ms", "rest_ms", "scoring_ms", "calibration_s")
TIMES = {*PARTS, *(f"{of}_{what}" for of in ("decode", "prefill") for what in ("ms", "ratio", "spread"))}


def mean(values: Iterable[object]) -> float | None:
    """The mean of those that are numbers; None if there is none."""
    known = [v for v in map(number, values) if v is not None]
    return sum(known) / len(known) if known else None


def ratio_mean(values: Iterable[object]) -> float | None:
    """The geometric mean of what is above 0, under which half the time and twice the time cancel.

    >>> ratio_mean([0.5, 2.0]), ratio_mean([0.0, 4.0, None]), ratio_mean([0.0])
    (1.0, 4.0, None)
    """
    log = mean(math.log(v) for v in map(number, values) if v is not None and v > 0)
    return None if log is None else math.exp(log)


def over(value: object, base: object) -> float | None:
    value, base = number(value), number(base)
    return value / base if value is not None and base else None


def ok(row: Row) -> bool:
    return row.get("status") == "ok"


def cell(row: Row) -> tuple[Any, Any, Any]:
    return row.get("task"), row.get("length"), row.get("seed")


def measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those that were left out, since full attention is near its floor there."""
    return [row for row in rows if row.get("status") != FLOOR]


def timed(rows: list[dict[str, Any]], timings: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows with what was timed of their method, budget and length; a row's own times stay."""
    key = lambda row: (row.get("label"), row.get("budget"), row.get("length"), row.get("seed"))  # noqa: E731
    known = {key(row): {k: v for k, v in row.items() if k in TIMES} for row in timings if ok(row)}
    return [known.get(key(row), {}) | row for row in rows]


@dataclass
class Result:
    """The cells of one comparison: `run` says where and how, a row is one cell of the grid.

    crossings   from which length on a method that leaves keys of a prompt unread is sooner at its first token
    timings     what prefill and decode take, of each method, budget and length; `load` puts them into its rows too
    unreadable  lines of results.jsonl that are not JSON, as a killed run leaves them
    """

    run: dict[str, Any]
    rows: list[dict[str, Any]]
    unreadable: list[int] = field(default_factory=list)
    crossings: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str | Path) -> "Result":
        """Read `run.json` and `results.jsonl`. A cell that was measured again replaces its older row.

        Rows of cells that the run no longer asks for, such as those on a text that has changed since, are left out.
        """
        folder, unreadable = Path(folder), []
        found: dict[str, dict[Any, dict[str, Any]]] = {"cell": {}, "crossing": {}, "timing": {}}
        header = folder / "run.json"
        run = json.loads(header.read_text(encoding="utf-8")) if header.exists() else {}
        lines = (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
        for at, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                unreadable.append(at)
                continue
            if isinstance(row, dict) and row.get("kind") in found:
                found[row["kind"]][row.get("key", at)] = row
        asked = set(run.get("cells") or found["cell"] | found["crossing"] | found["timing"])
        cells, crossings, timings = (
            [row for key, row in rows.items() if key in asked] for rows in found.values()
        )
        asked = sorted({str(row["template"]) for row in cells if row.get("template")})
        run |= {"prompts": f"asked in: {listing(asked)}"} if asked else {}
        return cls(run, timed(measured(cells), timings), unreadable, crossings, timings)

    def tasks(self) -> list[str]:
        return sorted({str(row["task"]) for row in self.rows})

    def lengths(self) -> list[int]:
        return sorted({row["length"] for row in self.rows})

    def size(self) -> int:
        """How many there are, those of times too."""
        return len(self.rows) + len(self.crossings) + len(self.timings)

    def failed(self) -> list[dict[str, Any]]:
        return [row for row in (*self.rows, *self.crossings, *self.timings) if not ok(row)]

    def baseline(self) -> dict[tuple[Any, Any], dict[str, float | None]]:
        """Full attention's quality and bytes read of each (task, length), the mean over its seeds.

        Near what guessing gives it is no measure of others: its quality is None.
        """
        groups: dict[tuple[Any, Any], list[Row]] = {}
        for row in self.rows:
            if row["method"] == "full" and ok(row):
                groups.setdefault(cell(row)[:2], []).append(row)
        keys = ("quality", "bytes_read", "bytes_held")
        means = {at: {key: mean(r.get(key) for r in rows) for key in keys} for at, rows in groups.items()}
        for floor in self.at_floor():
            means[floor["task"], floor["length"]]["quality"] = None
        return means

    def at_floor(self) -> list[dict[str, Any]]:
        """The (task, length) at which full attention is near what guessing gives: left out of means and ranks."""
        return at_floor(self.rows)

    def summary(self) -> list[dict[str, Any]]:
        """One row per method × budget: means over its cells, relative to full attention there."""
        base = self.baseline()
        expected = {cell(row) for row in self.rows if scored_by_full(row, base)}
        full = {cell(row): row for row in self.rows if row["method"] == "full" and ok(row)}
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(
                (str(row.get("label") or row["method"]), budget_text(row.get("budget"))), []
            ).append(row)
        rows = [summarise(group, base, full, expected) for group in groups.values()]
        return sorted(rows, key=lambda r: (r["method"] != "full", r["label"], budget_order(r["budget"])))

    def pareto(self, xkey: str, ykey: str = "quality") -> list[dict[str, Any]]:
        """The rows that no other row beats, less of `xkey` and more of `ykey` being better, by `xkey`.

        Only rows with every cell measured take part: a mean over the easy cells beats nobody.
        """
        known = [
            r for r in self.summary() if r["complete"] and None not in (number(r[xkey]), number(r[ykey]))
        ]
        front: list[dict[str, Any]] = []
        best = -math.inf
        for row in sorted(known, key=lambda r: (r[xkey], -r[ykey])):
            equal = front and (row[xkey], row[ykey]) == (front[-1][xkey], front[-1][ykey])
            if row[ykey] > best or equal:
                front.append(row)
                best = row[ykey]
        return front

    def keepers(self) -> list[dict[str, Any]]:
        """The methods that keep 95 % of full quality with every cell measured, cheapest first."""
        kept = [r for r in self.summary() if r["method"] != "full" and r["complete"]]
        return sorted(
            (r for r in kept if (r["quality"] or 0) >= KEEPS - 1e-9), key=cost("held", "read", "decode_ratio")
        )

    def winner(self) -> dict[str, Any] | None:
        """The cheapest that keeps 95 % of full quality: fewest bytes held, then read, then decode time."""
        return next(iter(self.keepers()), None)

    def sentence(self) -> str:
        """The plain answer: the cheapest method that keeps 95 % of full quality here, or that none does."""
        if not self.rows:
            return "No cell was measured."
        rows = [r for r in self.summary() if r["method"] != "full"]
        where = scope_text(self.run, *self.ranked())
        if not any(means["quality"] for means in self.baseline().values()):
            return (
                f"Full attention failed or is near what guessing gives everywhere {where}: nothing can be said "
                "relative to it."
            )
        if not rows:
            return f"Only full attention was measured {where}: there is no method to compare it with."
        kept, asked = self.keepers(), self.least_samples()
        text = winner_text(kept, where, asked) if kept else no_winner_text(rows, where, asked)
        broken = [r for r in rows if not r["complete"]]
        if broken:
            names = shortened([clean(name(r)) for r in broken])
            text += f" Not considered, with cells failed or missing: {names}."
        if floors := self.at_floor():
            text += f" Left out, as full attention is near what guessing gives there: {shortened(places(floors))}."
        return text

    def least_samples(self) -> int:
        """How many samples the smallest cell has; 0 where rows do not hold them."""
        return min((len(row["samples"]) for row in self.rows if ok(row) and row.get("samples")), default=0)

    def _repr_html_(self) -> str:
        return notebook_html(self.sentence(), self.summary())

    def ranked(self) -> tuple[list[str], list[int]]:
        """The tasks and lengths that rank methods; all, where none does."""
        cells = [at for at, means in self.baseline().items() if means["quality"]]
        tasks, lengths = sorted({str(task) for task, _ in cells}), sorted({length for _, length in cells})
        return (tasks, lengths) if cells else (self.tasks(), self.lengths())

    def notes(self) -> list[str]:
        """What a reader must know before trusting the means."""
        notes, base = [], self.baseline()
        if self.unreadable:
            lines = f"{'line' if len(self.unreadable) == 1 else 'lines'} {listing(self.unreadable[:5])}"
            notes.append(
                f"results.jsonl has {plural(len(self.unreadable), 'unreadable line')} ({lines}), left out."
            )
        cells, floors = sorted({cell(row)[:2] for row in self.rows}, key=str), self.at_floor()
        notes += floor_notes(floors)
        near = {(floor["task"], floor["length"]) for floor in floors}
        lost = [at for at in cells if not base.get(at, {}).get("quality") and at not in near]
        if lost:
            notes.append(f"No ratio is possible where full attention failed: {cells_text(lost)}.")
        weak = [at for at in cells if 0 < (base.get(at, {}).get("quality") or 0) < 0.5]
        if weak:
            notes.append(
                f"Full attention itself scores below 50 %, so ratios say little: {cells_text(weak)}."
            )
        return [*notes, *interval_notes([r for r in self.rows if ok(r)], self.summary())]


def scored_by_full(row: Row, base: Mapping) -> bool:
    """Whether full attention scores anything in the row's cell, so that a quality can be relative to its."""
    return bool(base.get(cell(row)[:2], {}).get("quality"))


def summarise(rows: list[Row], base: Mapping, full: Mapping, expected: set) -> dict[str, Any]:
    """The means of one method × budget over its cells; `full` has full attention's row of each."""
    good = [row for row in rows if ok(row)]
    scored = [row for row in good if scored_by_full(row, base) and number(row.get("quality")) is not None]
    relative = {id(row): over(row["quality"], base[cell(row)[:2]]["quality"]) for row in scored}
    lacking = expected - {cell(row) for row in scored}
    failed, is_full = len(rows) - len(good), rows[0]["method"] == "full"
    quality = mean(relative.values())
    low, high = interval([(row, full.get(cell(row)), base[cell(row)[:2]]["quality"]) for row in scored])
    return {
        **{key: rows[0].get(key) for key in ("method", "budget")},
        "label": str(rows[0].get("label") or rows[0]["method"]),
        "quality": quality,
        "quality_low": low,
        "quality_high": high,
        "tasks": {
            task: mean(relative[id(row)] for row in scored if str(row["task"]) == task)
            for task in sorted({str(row["task"]) for row in rows})
        },
        "held": mean(held(row, base) for row in good),
        "read": mean(read(row, base) for row in good),
        "decode_ratio": ratio_mean(row.get("decode_ratio") for row in good),
        "prefill_ratio": ratio_mean(row.get("prefill_ratio") for row in good),
        **{
            key: mean(row.get(key) for row in good)
            for key in ("decode_spread", "prefill_spread", "decode_ms")
        },
        **{key: mean(row.get(key) for row in good) for key in ("agreement", "kl", "calibration_s")},
        "scoring": mean(
            over(r.get("scoring_ms"), over(r.get("prefill_ms"), r.get("prefill_ratio"))) for r in good
        ),
        "cells": len(good),
        "failed": failed,
        "missing": 0 if is_full else len(lacking - {cell(row) for row in rows if not ok(row)}),
        "complete": quality is not None and (is_full or not lacking),
    }


def failed_groups(result: Result) -> list[dict[str, Any]]:
    """The failed cells, together where method, reason and lengths are the same."""
    lengths: dict[tuple[str, ...], set[int]] = {}
    for row in result.failed():
        key = (name(row), str(row["status"]), str(row.get("error") or ""), str(row["task"]))
        lengths.setdefault(key, set()).add(row["length"])
    tasks: dict[tuple[Any, ...], list[str]] = {}
    for (*why, task), group in lengths.items():
        tasks.setdefault((*why, tuple(sorted(group))), []).append(task)
    keys = ("method", "status", "why", "lengths")
    return [dict(zip(keys, key, strict=True)) | {"tasks": sorted(group)} for key, group in tasks.items()]


def held(row: Row, base: Mapping) -> float | None:
    return over(row.get("bytes_held"), row.get("bytes_full") or base.get(cell(row)[:2], {}).get("bytes_held"))


def read(row: Row, base: Mapping) -> float | None:
    """What is read of what full attention reads, whether or not it answers anything right."""
    return over(
        row.get("bytes_read"), row.get("bytes_read_full") or base.get(cell(row)[:2], {}).get("bytes_read")
    )


def cells_text(cells: list[tuple[Any, Any]]) -> str:
    return shortened([f"{clean(task)} at length {length}" for task, length in cells])
