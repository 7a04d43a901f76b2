"""A Result as Markdown: the sentence, the table, the failed cells."""

import re

from regard.report.applied import advice
from regard.report.prefill import COLUMNS, first_token_sentence, only_prompts, table_rows
from regard.report.result import Result
from regard.report.turns import TITLES, columns
from regard.report.turns import table_rows as rows_by
from regard.report.words import budget_text, clean, name, percent, short, times


def escape(text: object) -> str:
    """Text that Markdown shows as it is: no emphasis, link, tag or table cell begins in it."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", clean(text))


def line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def parts(title: str, rows: list[dict[str, str]]) -> list[str]:
    """A table of what was found turn by turn or place by place; nothing where nothing was."""
    if not rows:
        return []
    heads = columns(rows)
    ruler = ["---", "---", *["---:"] * (len(heads) - 2)]
    return [
        "",
        f"{title}:",
        "",
        line(heads),
        line(ruler),
        *(line([escape(r.get(h, "")) for h in heads]) for r in rows),
    ]


def to_markdown(result: Result) -> str:
    tasks = result.tasks()
    rows = result.summary()
    scored, calibrated = ([key] if any(r[key] for r in rows) else [] for key in ("scoring", "calibration_s"))
    more = [*scored, *("calibrated" for _ in calibrated)]
    head = [
        "method",
        "budget",
        "quality",
        *map(escape, tasks),
        "held",
        "read",
        "decode",
        "prefill",
        *more,
        "failed",
    ]
    said = first_token_sentence(result) if only_prompts(result) else result.sentence()
    lines = [escape(said), "", *(f"- {escape(note)}" for note in result.notes()), ""]
    lines += [line(head), line(["---", "---", *["---:"] * (len(head) - 2)])]
    for row in rows:
        shares = [
            percent(v)
            for v in (row["quality"], *(row["tasks"].get(t) for t in tasks), row["held"], row["read"])
        ]
        tail = [
            times(row["decode_ratio"]),
            times(row["prefill_ratio"]),
            *(percent(row[key]) for key in scored),
        ]
        tail += [f"{short(row[key])} s" if row[key] else "" for key in calibrated]
        tail.append(str(row["failed"] + row["missing"]))
        lines.append(line([escape(row["label"]), budget_text(row["budget"]), *shares, *tail]))
    key = "Quality, bytes and times are relative to full attention in the same cells."
    lines += ["", key + (" Scoring: a share of full attention's prefill." if scored else "")]
    if partial := table_rows(result):
        lines += ["", *([] if only_prompts(result) else [escape(first_token_sentence(result)), ""])]
        lines += [line(list(COLUMNS))]
        lines += [line(["---", *["---:"] * (len(COLUMNS) - 1)])]
        lines += [line([escape(row[key]) for key in COLUMNS]) for row in partial]
    for key, title in TITLES.items():
        lines += parts(title, rows_by(result, key))
    failed = [
        f"- {escape(name(r))}, {escape(r['task'])} at length {r['length']}: {escape(r['status'])}"
        + (f" ({escape(r['error'])[:200]})" if r.get("error") else "")
        for r in result.failed()
    ]
    lines += ["", "Failed cells:", "", *failed] if failed else []
    for each in advice(result):
        lines += ["", f"{each.why}: {escape(each.name)}", "", "```python", *each.lines, "```"]
    return "\n".join([*lines, ""])
