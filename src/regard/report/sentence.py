"""The plain answer of a comparison: which method is the cheapest, what it costs, and whether that can be told yet."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regard.report.words import KEEPS, clean, described, name, percent, times

FEW = 8  # with fewer samples in a cell nothing is told
MOST = 10_000  # samples; more are not worth naming

Row = Mapping[str, Any]


def cost(*keys: str):
    """A sort key: these columns in turn, to a thousandth, so that rounded bytes tie; unknown is dear."""
    return lambda row: tuple(math.inf if row[key] is None else round(row[key], 3) for key in keys)


def winner_text(kept: Sequence[Row], where: str, asked: int) -> str:
    """Of the methods that keep 95 % of full quality, the cheapest first; `asked` samples has the smallest cell."""
    best = kept[0]
    claim = "is the cheapest that keeps 95 % of full attention's quality"
    text = f"{clean(name(best))} {claim} {where}, by bytes held: {described(best)}."
    known = {task: kept for task, kept in best["tasks"].items() if kept is not None}
    worst = min(known, key=lambda task: known[task])
    if len(known) > 1 and known[worst] < KEEPS - 1e-9:
        text += f" That is a mean: on {clean(worst)} it keeps {percent(known[worst])}."
    text += doubt(best, asked) + slower(best)
    if cost("held")(best) >= (1.0,):
        text += " It holds no fewer bytes than full attention; nothing that does keeps 95 %."
    reader = min(kept, key=cost("read", "held", "decode_ratio"))
    if cost("read")(reader) < cost("read")(best):
        text += f" {clean(name(reader))} reads least: {described(reader)}."
    return text


def no_winner_text(rows: Sequence[Row], where: str, asked: int) -> str:
    """That no method keeps 95 %, the nearest, and whether more samples could say otherwise."""
    whole = [r for r in rows if r["complete"]]
    if not whole:
        return f"No method finished every cell {where}, so none can be said to keep 95 % of full quality."
    best = max(whole, key=lambda r: r["quality"])
    nearest = f"Nearest is {clean(name(best))}: {described(best)}."
    return f"No method keeps 95 % of full attention's quality {where}. {nearest}{doubt(best, asked)}"


def doubt(row: Row, asked: int) -> str:
    """Why a side of 95 % cannot be told yet, and how many samples would tell; "" where it can.

    An interval is as wide as one over the root of the samples.
    """
    if 0 < asked < FEW:
        return f" With {asked} samples in a cell nothing can be told: ask for {FEW} or more, --samples {FEW}."
    low, high = row["quality_low"], row["quality_high"]
    if None in (low, high) or not low < KEEPS - 1e-9 < high:
        return ""
    off = row["quality"] - KEEPS
    half = row["quality"] - low if off >= 0 else high - row["quality"]
    needed = math.ceil(asked * (half / off) ** 2 - 1e-6) if abs(off) > 1e-6 else math.inf
    would = (
        f"about {needed:,} samples in a cell would" if needed <= MOST else f"even {MOST:,} samples would not"
    )
    return (
        f" Its interval spans 95 %, so {asked} samples in a cell cannot tell its side; {would}."
        if asked
        else ""
    )


def slower(row: Row) -> str:
    """That a step takes longer than full attention's, where it does beyond its spread."""
    ratio, spread = row["decode_ratio"], row["decode_spread"] or 0.0
    late = ratio is not None and ratio - spread > 1.005
    return f" It decodes slower than full attention: {times(ratio)} its time." if late else ""
