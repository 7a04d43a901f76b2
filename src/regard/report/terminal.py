"""Results in the terminal: tables that fit 80 columns, with colour only where it says something."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.report.applied import GENERATE, advice
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
NARROW = 72  # in fewer columns failed cells are lines


def table(
    rows: Iterable[Row],
    columns: Sequence[str] | Mapping[str, str],
    title: str = "",
    whole: Sequence[str] = (),
) -> Table:
    """A table of rows of data; `columns` are their keys, or keys with the heads to print; `whole` ones do not wrap.

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
        result.add_column(
            Text(head), justify="right" if right else "left", overflow="fold", no_wrap=right or key in whole
        )
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
    return sum((1 if head == "●" else max(len(head), PERCENT)) + GAP for head in heads.values())


def wide(
    rows: Sequence[Row], lead: Sequence[str], heads: Mapping[str, str], title: str, width: int
) -> list[Table]:
    """One table, or several below one another that all begin with the columns `lead`, so that none is wider."""
    longest = {key: max([len(key), *(widest_line(row.get(key)) for row in rows)]) for key in lead}
    if longest["method"] > max(width // 3, len("method")):
        rows = [{**row, "method": two_lines(row["method"])} for row in rows]
        # a name that would still take more than half is folded
        longest["method"] = min(max(widest_line(row["method"]) for row in rows), width // 2 - GAP)
    room = width - sum(most + GAP for most in longest.values()) - GAP
    parts = in_parts(heads, room)
    whole = [key for key in (*lead, *heads) if key != "method"]
    return [
        table(rows, {**{key: key for key in lead}, **part}, title if at == 0 else "", whole)
        for at, part in enumerate(parts)
    ]


def widest_line(cell: object) -> int:
    return max(map(len, str(cell or "").split("\n")))


def two_lines(cell: Text | str) -> Text:
    """A method's name with its settings in the next line."""
    style = cell.style if isinstance(cell, Text) else ""
    return Text(str(cell).replace("(", "\n(", 1), style=style)


def failed_rows(result: Result) -> list[dict[str, Any]]:
    return [
        row | {"status": Text(clean(row["status"]), style="red"), "why": clean(row["why"])[:300]}
        for row in failed_groups(result)
    ]


def show(result: Result, console: Console | None = None) -> None:
    """Print the comparison: the tables, the failed cells with their reasons, the sentence, how to apply it."""
    console = console or Console()
    for each in (*summary_tables(result, console.width), *turn_tables(result, console.width)):
        console.print(each)
    show_prompts(result, console)
    show_failed(result, console)
    for note in result.notes():
        console.print(Text(f"Note: {note}", style="yellow"))
    if not only_prompts(result):
        console.print(Text(result.sentence(), style="bold"), soft_wrap=False)
    show_advice(result, console)


def summary_tables(result: Result, width: int) -> list[Table]:
    """Quality and costs; the tasks among them where there is room, else by themselves."""
    rows, tasks = summary_rows(result), result.tasks()
    lost = ["failed"] if any(r["failed"].plain for r in rows) else []
    costs = {k: k for k in ("held", "read", "decode", "prefill", *lost)}
    by_task = {f"task {t}": clean(t) for t in tasks}
    inside = len(tasks) > 1 and width >= SUMMARY + widths(by_task)
    first = {"quality": "quality", "front": "●"} | (by_task if inside else {}) | costs
    made = wide(
        rows, LEAD, first, "Relative to full attention; ● on the front of quality and bytes held", width
    )
    return made + (
        wide(rows, LEAD, by_task, "Quality by task", width) if len(tasks) > 1 and not inside else []
    )


LEAD = ("method", "budget")


def turn_tables(result: Result, width: int) -> list[Table]:
    turns = rows_by(result, "by_turn")
    if not turns:
        return []
    heads = columns(turns)
    by = [{h: right(r.get(h, "")) if h in heads[2:] else r[h] for h in heads} for r in turns]
    lead = heads[:3] if len({r["task"] for r in turns}) > 1 else heads[1:3]
    return wide(by, lead, {h: h for h in heads[3:]}, TITLES["by_turn"], width)


def show_prompts(result: Result, console: Console) -> None:
    """Of prompts that are read in part: the time to the first token and from which length on it pays."""
    partial = table_rows(result)
    if not partial:
        return
    rows = [{**r, **{key: right(r[key]) for key in COLUMNS[1:-1]}} for r in partial]
    title = "Time to the first token, over full attention's, and where it went"
    for each in wide(rows, COLUMNS[:2], {key: key for key in COLUMNS[2:-1]}, title, console.width):
        console.print(each)
    for label, crossed in crossings(result).items():
        console.print(Text(f"{clean(label)} pays from: {crossing_text(crossed)}"))
    console.print(Text(first_token_sentence(result), style="bold"))


def show_failed(result: Result, console: Console) -> None:
    """A table of the failed cells; a line for each group where a table would leave its reasons no room."""
    failed = failed_rows(result)
    if failed and console.width >= NARROW:
        console.print(
            table(failed, ["method", "tasks", "lengths", "status", "why"], "Failed cells", ["status"])
        )
    for row in failed if console.width < NARROW else ():
        where = f"{clean(short(row['tasks']))} at {short(row['lengths'])}"
        why = f" ({row['why']})" if row["why"] else ""
        console.print(Text.assemble(f"Failed: {clean(row['method'])} on {where}: ", row["status"], why))


def show_advice(result: Result, console: Console) -> None:
    """The lines of Python that attach what is recommended, in so many columns; as they are for what copies them."""
    for said in advice(result, console.width):
        console.print(Text(f"\n{said.why}: {said.name}", style="bold"))
        shown = [line for line in said.lines if line != GENERATE and not line.startswith("import")]
        console.print(Text("\n".join([*shown, "    ..."]).strip("\n")))
