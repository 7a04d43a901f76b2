"""The needle map: where in the text a method still finds what it is asked for. Small drawings, no script."""

import html
from itertools import pairwise
from typing import Any

from regard.report.marks import Marks, glyph
from regard.report.result import Result, mean
from regard.report.words import budget_order, budget_text, clean, number, percent

# dark where it fails, also in grey
STOPS = ((0.0, (122, 31, 10)), (0.5, (232, 163, 92)), (1.0, (222, 234, 244)))
Scores = dict[tuple[float, int], float | None]


def colour(score: float) -> str:
    """A mark between 0 and 1 as a colour whose lightness rises with it."""
    score = min(1.0, max(0.0, score))
    for (a, low), (b, high) in pairwise(STOPS):
        if score <= b:
            t = (score - a) / (b - a)
            return "#" + "".join(f"{round(p + t * (q - p)):02x}" for p, q in zip(low, high, strict=True))
    raise AssertionError(score)


def needle_tasks(result: Result) -> list[str]:
    return [t for t in result.tasks() if any(depth_scores([r]) for r in result.rows if str(r["task"]) == t)]


def depth_scores(rows: list[dict[str, Any]]) -> list[tuple[float, int, float]]:
    """(depth, length, score) of every sample that has a depth."""
    samples = [(r["length"], s) for r in rows if r["status"] == "ok" for s in r.get("samples") or []]
    known = [(number(s.get("depth")), n, number(s.get("score"))) for n, s in samples]
    return [(d, n, score) for d, n, score in known if d is not None and score is not None]


def binned(depth: float, depths: list[float]) -> float:
    """The depth itself where few are asked for, else the middle of its tenth."""
    return depth if len(depths) <= 12 else min(int(depth * 10), 9) / 10 + 0.05


def tile(scores: Scores, depths: list[float], lengths: list[int], what: str) -> str:
    """One map: a column per length, a row per depth, the start of the text on top."""
    wide, high = max(10, 84 // len(lengths)), max(7, 64 // len(depths))
    cells = []
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            score = scores.get((depth, length))
            fill = "url(#unmeasured)" if score is None else colour(score)
            text = "not measured" if score is None else percent(score)
            title = f"length {length}, depth {percent(depth)}: {text}"
            box = f'x="{x * wide}" y="{y * high}" width="{wide - 1}" height="{high - 1}"'
            cells.append(f'<rect {box} fill="{fill}"><title>{html.escape(title)}</title></rect>')
    size = f'width="{wide * len(lengths)}" height="{high * len(depths)}"'
    return f'<svg class="tile" role="img" aria-label="{html.escape(what)}" {size}>{"".join(cells)}</svg>'


def key(depths: list[float], lengths: list[int]) -> str:
    """The legend: which way the axes run, and the colours."""
    steps = "".join(f'<rect x="{i * 12}" width="12" height="12" fill="{colour(i / 10)}"/>' for i in range(11))
    bar = f'<svg width="132" height="12" role="img" aria-label="dark is 0, light is 1">{steps}</svg>'
    unknown = '<svg width="12" height="12"><rect width="12" height="12" fill="url(#unmeasured)"/></svg>'
    across = ", ".join(map(str, lengths))
    down = f"{percent(depths[0])} (start of the text, top) to {percent(depths[-1])} (end, bottom)"
    return (
        f'<p class="key"><span>Columns: length {across}</span><span>Rows: depth {down}</span>'
        f"<span>wrong 0 {bar} 1 right</span><span>{unknown} not measured</span></p>"
    )


def needle_map(result: Result, task: str, marked: Marks) -> str:
    """A card per method with a map per budget, all on the same colours and axes."""
    rows = [r for r in result.rows if str(r["task"]) == task]
    lengths = sorted({r["length"] for r in rows})
    tested = sorted({d for d, _, _ in depth_scores(rows)})
    depths = sorted({binned(d, tested) for d in tested})
    cards = []
    for label, (ink, shape) in marked.items():
        mine = [r for r in rows if str(r.get("label") or r["method"]) == label]
        budgets = sorted({budget_text(r["budget"]): r["budget"] for r in mine}.values(), key=budget_order)
        maps = [
            one_map(
                [r for r in mine if budget_text(r["budget"]) == budget_text(b)],
                b,
                label,
                tested,
                depths,
                lengths,
            )
            for b in budgets
        ]
        if maps:
            head = f"<h4>{glyph(ink, shape)} {html.escape(clean(label))}</h4>"
            cards.append(f'<div class="card">{head}<div class="maps">{"".join(maps)}</div></div>')
    return key(depths, lengths) + f'<div class="cards">{"".join(cards)}</div>'


def one_map(
    rows: list[dict[str, Any]], budget: object, label: str, tested: list, depths: list, lengths: list
) -> str:
    groups: dict[tuple[float, int], list[float]] = {}
    for depth, length, score in depth_scores(rows):
        groups.setdefault((binned(depth, tested), length), []).append(score)
    scores = {at: mean(values) for at, values in groups.items()}
    # of the samples, not of the tiles, which hold different numbers of them
    overall = percent(mean(score for values in groups.values() for score in values))
    caption = f"{budget_text(budget)} · {overall}" if budget is not None else overall
    drawn = tile(
        scores, depths, lengths, f"needle map of {clean(label)} {budget_text(budget)}: {overall} right"
    )
    return f"<figure>{drawn}<figcaption>{html.escape(clean(caption))}</figcaption></figure>"
