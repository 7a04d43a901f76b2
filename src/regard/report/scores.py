"""What `regard evaluate` found: scores of tasks under methods, and their differences to full attention in pairs.

Every method answers the very documents that full attention answered, so differences are drawn document by document: the
interval of a difference is narrower than the two standard errors would have it.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from regard.report.terminal import right, table
from regard.report.words import NONE, budget_text, clean, number, over_text, plural

DRAWS = 1000
FEW_DRAWS = 100  # of metrics of whole corpora, as lm-eval draws them
CORPUS = ("bleu", "chrf", "chrf++", "ter")
FULL = "full"

Row = Mapping[str, Any]
Aggregate = Callable[[list], float] | None


@dataclass
class Evaluation:
    """The scores of one run: `run` says where and how; `rows` are scores; `cells` one task under one method each."""

    run: dict[str, Any]
    rows: list[dict[str, Any]]
    cells: list[dict[str, Any]]

    def failed(self) -> list[dict[str, Any]]:
        return [cell for cell in self.cells if cell["status"] != "ok"]

    def scores(self) -> list[dict[str, Any]]:
        """The rows without the values of single documents."""
        return [{key: value for key, value in row.items() if key != "items"} for row in self.rows]


def is_share(row: Row) -> bool:
    """Whether a score is the mean of values in [0, 1], so that it is said in per cent.

    >>> [is_share({"items": [["a", v], ["b", 1.0]]}) for v in (0.25, True, 1.5, -0.1, None)], is_share({})
    ([True, True, False, False, False], False)
    """
    values = [value for _, value in row.get("items") or ()]
    if not values:
        return False
    return all(isinstance(v, bool) or (number(v) is not None and 0 <= v <= 1) for v in values)


def difference(ours: Row, full: Row | None, aggregate: Aggregate = None) -> dict[str, float | None]:
    """The score minus full attention's, with the interval within which 95 % of draws over the documents lie.

    aggregate   how the score comes from the documents' values; None: their mean

    {} where full attention has no score; without an interval where the two have not answered the same documents, or
    fewer than two.

    >>> a = {"task": "t", "value": 0.5, "items": [[0, 1], [1, 0]]}
    >>> b = {"task": "t", "value": 1.0, "items": [[0, 1], [1, 1]]}
    >>> difference(a, b)
    {'difference': -0.5, 'difference_low': -1.0, 'difference_high': 0.0}
    """
    values = [None if row is None else number(row["value"]) for row in (ours, full)]
    if full is None or values[0] is None or values[1] is None:
        return {}
    found: dict[str, float | None] = {"difference": values[0] - values[1]}
    theirs = dict(map(tuple, full["items"]))
    pairs = [(value, theirs[at]) for at, value in ours["items"] if at in theirs]
    low = high = None
    if len(pairs) == len(ours["items"]) == len(theirs) > 1:
        low, high = interval([a for a, _ in pairs], [b for _, b in pairs], aggregate, draws_of(ours))
    return found | {"difference_low": low, "difference_high": high}


def draws_of(row: Row) -> Iterator[np.ndarray]:
    """Which documents each draw takes: the same for every method on a task, others on another task."""
    seed = int.from_bytes(hashlib.sha256(str(row["task"]).encode()).digest()[:8])
    drawn, n = np.random.default_rng(seed), len(row["items"])
    few = any(str(row.get("metric")).startswith(name) for name in CORPUS)
    return (drawn.integers(0, n, n) for _ in range(FEW_DRAWS if few else DRAWS))


def interval(
    ours: list, theirs: list, aggregate: Aggregate, draws: Iterator[np.ndarray]
) -> tuple[float | None, float | None]:
    """[2.5 %, 97.5 %] of the difference over draws of documents, the same for both."""
    if aggregate is None:
        apart = np.array(ours, dtype=float) - np.array(theirs, dtype=float)
        found = [apart[pick].mean() for pick in draws]
    else:
        found = [aggregate([ours[i] for i in pick]) - aggregate([theirs[i] for i in pick]) for pick in draws]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def with_differences(
    rows: Sequence[dict], aggregate: Callable[[str, str], Aggregate]
) -> list[dict[str, Any]]:
    """The rows, those of methods with their difference to full attention's row of the same task and metric."""
    full = {(row["task"], row["metric"], row["filter"]): row for row in rows if row["method"] == FULL}
    made = []
    for row in rows:
        theirs = full.get((row["task"], row["metric"], row["filter"]))
        apart = {} if row is theirs else difference(row, theirs, aggregate(row["task"], row["metric"]))
        made.append({"share": is_share(row), **row, **apart})
    return made


def value_text(row: Row) -> str:
    """ "65.0 ± 10.9" in per cent, "12.34" otherwise."""
    value, error = number(row["value"]), number(row.get("stderr"))
    if value is None:
        return NONE
    return written(value, row) + ("" if error is None else f" ± {written(error, row)}")


def written(value: float, row: Row, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if row["share"] else f"{value:{sign}.4g}"


def difference_text(row: Row) -> str:
    """ "-3.1 [-5.0, -1.2]"; nothing for full attention."""
    if number(row.get("difference")) is None:
        return "" if row["method"] == FULL else NONE
    text, low = written(row["difference"], row, "+"), number(row.get("difference_low"))
    return text if low is None else f"{text} [{written(low, row)}, {written(row['difference_high'], row)}]"


def shown(row: Row, cells: Mapping[str, Row], full: Row) -> dict[str, Any]:
    """A row as text; `full` is what full attention held and read."""
    cell = cells.get(row["cell"], {})
    return {
        "method": Text(clean(row["label"])),
        "budget": right(budget_text(row["budget"])),
        "score": right(value_text(row)),
        "difference": right(difference_text(row)),
        "held": right(over_text(cell.get("bytes_held"), full.get("bytes_held"))),
        "read": right(over_text(cell.get("bytes_read"), full.get("bytes_read"))),
    }


def title_of(row: Row) -> str:
    """ "capitals, acc ↑ in %: 20 documents, 0-shot": higher or lower is better, and the filter where there is one."""
    arrow = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
    metric = row["metric"] + arrow + ("" if row["filter"] == "none" else f" {row['filter']}")
    shots = "" if row.get("num_fewshot") is None else f", {row['num_fewshot']}-shot"
    documents = plural(row["documents"], "document")
    return clean(f"{row['task']}, {metric}{' in %' if row['share'] else ''}: {documents}{shots}")


HEADS = {
    "method": "method", "budget": "budget", "score": "score", "difference": "minus full [95 %]",
    "held": "held", "read": "read",
}  # fmt: skip


def show(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print a table for each metric of each task, full attention first, groups last; and what failed, and why."""
    console = console or Console()
    cells = {cell["key"]: cell for cell in evaluation.cells}
    tables: dict[tuple, list[Row]] = {}
    for row in evaluation.rows:
        tables.setdefault((row["task"], row["metric"], row["filter"]), []).append(row)
    for rows in tables.values():
        full = next((cells.get(row["cell"], {}) for row in rows if row["method"] == FULL), {})
        console.print(table([shown(row, cells, full) for row in rows], HEADS, title_of(rows[0])))
    if failed := evaluation.failed():
        told = [{**c, "budget": budget_text(c["budget"]), "error": clean(c["error"])[:300]} for c in failed]
        heads = {"task": "task", "label": "method", "budget": "budget", "status": "status", "error": "why"}
        console.print(table(told, heads, "Failed"))
