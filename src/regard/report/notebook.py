"""A comparison in a notebook: the sentence and a small table, without scripts."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.report.words import budget_text, clean, percent, times

MOST = 30  # rows; the report has all
HEADS = ("method", "budget", "quality", "interval", "held", "read", "decode")


def notebook_html(sentence: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML of the summary's rows, full attention first and then by quality."""
    ranked = sorted(rows, key=lambda r: (r["method"] != "full", not r["complete"], -(r["quality"] or 0)))
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells(row))}</tr>" for row in ranked[:MOST]
    )
    more = f"<p>and {len(ranked) - MOST} more</p>" if len(ranked) > MOST else ""
    return f"<p>{escape(sentence)}</p><table><tr>{heads}</tr>{body}</table>{more}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, by HEADS."""
    low, high = row["quality_low"], row["quality_high"]
    ends = "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
    shares = [percent(row["held"]), percent(row["read"]), times(row["decode_ratio"])]
    return [clean(row["label"]), budget_text(row["budget"]), percent(row["quality"]), ends, *shares]
