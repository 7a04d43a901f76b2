"""Results in the terminal: tables that fit 80 columns, with colour only where it says something."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.report.prefill import (
    COLUMNS,
    crossing_text,
    crossings,
    first_token_sentence,
    only_prompts,
    table_rows,
)
from regard.report.result import Result, Row, failed_groups
from regard.report.turns import TITLES, columns
from regard.report.turns import table_rows as rows_by
from regard.report.words import KEEPS, budget_text, clean, name, percent, short, times

SUMMARY, PERCENT, GAP = 84, 5, 2  # columns of the summary, of a number, between columns


def table(rows: Iterable[Row], columns: Sequence[str] | Mapping[str, str], title: str = "") -> Table:
    """A table of rows of data; `columns` are their keys, or keys with the heads to print.

    Values are printed as text, whatever they contain: neither markup nor escape sequences act.
    """
    heads = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    rows = list(rows)
    result = Table(
        box=box.SIMPLE_HEAD,
        title=Text(title) if title else None,
        title_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for key, head in heads.items():
        right = any(isinstance(row.get(key), int | float) for row in rows)
        result.add_column(Text(head), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        result.add_row(
            *(
                value if isinstance(value := row.get(key), Text) else Text(clean(short(value)))
                for key in heads
            )
        )
    return result


def share(value: float | None, best: bool = False) -> Text:
    """A quality: bold for the winner, dim where it falls short."""
    low = value is not None and value < KEEPS - 1e-9
    return Text(percent(value), style="bold green" if best else "dim" if low else "", justify="right")


def summary_rows(result: Result) -> list[dict[str, Any]]:
    """The summary as text, best quality first under full attention, failures in red."""
    best, front = result.winner(), {name(r) for r in result.pareto("held")}
    summary = sorted(
        result.summary(), key=lambda r: (r["method"] != "full", not r["complete"], -(r["quality"] or 0))
    )
    rows = []
    for row in summary:
        won, lost = best is not None and name(row) == name(best), row["failed"] + row["missing"]
        rows.append(
            {
                "method": Text(clean(row["label"]), style="bold" if won else ""),
                "budget": right(budget_text(row["budget"])),
                "quality": share(row["quality"], won),
                "front": Text("●" if name(row) in front else "", justify="center"),
                **{f"task {t}": share(v) for t, v in row["tasks"].items()},
                "held": right(percent(row["held"])),
                "read": right(percent(row["read"])),
                "decode": right(times(row["decode_ratio"])),
                "prefill": right(times(row["prefill_ratio"])),
                "failed": right(str(lost) if lost else "", "red"),
            }
        )
    return rows


def right(text: str, style: str = "") -> Text:
    return Text(text, style=style, justify="right")


def in_parts(heads: Mapping[str, str], room: int) -> list[dict[str, str]]:
    """The columns of one wide table as those of several, each at least one column and no wider than there is room.

    >>> in_parts({"a": "needle", "b": "variable_tracking", "c": "turns"}, 26)
    [{'a': 'needle'}, {'b': 'variable_tracking', 'c': 'turns'}]
    """
    parts: list[dict[str, str]] = []
    for key, head in heads.items():
        if not parts or widths({**parts[-1], key: head}) > room:
            parts.append({})
        parts[-1][key] = head
    return parts


def widths(heads: Mapping[str, str]) -> int:
    return sum(max(len(head), PERCENT) + GAP for head in heads.values())


def failed_rows(result: Result) -> list[dict[str, Any]]:
    return [
        row | {"status": Text(clean(row["status"]), style="red"), "why": clean(row["why"])[:300]}
        for row in failed_groups(result)
    ]


def show(result: Result, console: Console | None = None) -> None:
    """Print the comparison: the table, the failed cells with their reasons, the sentence."""
    console = console or Console()
    rows, tasks = summary_rows(result), result.tasks()
    costs = [
        "held",
        "read",
        "decode",
        "prefill",
        *(["failed"] if any(r["failed"].plain for r in rows) else []),
    ]
    by_task = {f"task {t}": clean(t) for t in tasks}
    inside = len(tasks) > 1 and console.width >= SUMMARY + widths(by_task)
    first = {k: k for k in ("method", "budget", "quality")} | {"front": "●"}
    shown = first | (by_task if inside else {}) | {k: k for k in costs}
    console.print(table(rows, shown, "Relative to full attention; ● on the front of quality and bytes held"))
    if len(tasks) > 1 and not inside:
        taken = max(len(row["method"].plain) for row in rows) + len("budget") + 3 * GAP
        for part in in_parts(by_task, console.width - taken):
            console.print(table(rows, {"method": "method", "budget": "budget"} | part, "Quality by task"))
    if turns := rows_by(result, "by_turn"):
        heads = columns(turns)
        by = [{h: right(r.get(h, "")) if h in heads[2:] else r[h] for h in heads} for r in turns]
        console.print(table(by, heads, TITLES["by_turn"]))
    if partial := table_rows(result):
        rows = [{**r, **{key: right(r[key]) for key in COLUMNS[1:-1]}} for r in partial]
        shown = {key: key for key in COLUMNS[:-1]}
        console.print(table(rows, shown, "Time to the first token, over full attention's, and where it went"))
        for label, crossed in crossings(result).items():
            console.print(Text(f"{clean(label)} pays from: {crossing_text(crossed)}"))
        console.print(Text(first_token_sentence(result), style="bold"))
    if failed := failed_rows(result):
        console.print(table(failed, ["method", "tasks", "lengths", "status", "why"], "Failed cells"))
    for note in result.notes():
        console.print(Text(f"Note: {note}", style="yellow"))
    if not only_prompts(result):
        console.print(Text(result.sentence(), style="bold"), soft_wrap=False)
