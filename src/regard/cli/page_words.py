"""A page in lines of text: its docstring with the equation's lines kept, labelled values, a claim in words."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import Any

LABEL, PROSE = 9, 100  # columns of a label, at most of running text
SHOWN = 8  # numbers of a list that are shown; a list of a few more is shown whole
GAP = re.compile(r"(?<=\S) {3,}(?=\S)")  # before a remark; two spaces are within an equation
TIED = "\N{NO-BREAK SPACE}"
END = " "  # of a docstring: what is open is set


def folded(text: str, width: int, first: str = "", later: str | None = None) -> list[str]:
    """Lines of at most `width` columns, broken at spaces; a word that is longer stays whole."""
    rest = first if later is None else later
    lines = wrap(
        text,
        max(width, len(rest) + 20),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(TIED, " ") for line in lines] or [first.rstrip()]


def labelled(label: str, value: str, width: int) -> list[str]:
    """A value under its label; further lines stand below the first."""
    first = f"{label:>{LABEL}}  "
    return folded(value, min(width, PROSE), first, " " * len(first))


def docstring_lines(text: str, width: int) -> Iterator[tuple[str, bool]]:
    """(line, whether it is an example) of a docstring: prose is set anew, equations and examples keep their lines."""
    prose: list[str] = []
    example = False
    for line in [*text.splitlines(), END]:
        example = line.startswith(">>>") or (example and bool(line.strip()))
        kept = example or not line.strip() or line.startswith(" " * 4) or bool(re.search(r"\S {3,}\S", line))
        if prose and (kept or line.startswith("- ")):
            yield from ((one, False) for one in folded(" ".join(prose), min(width, PROSE)))
            prose = []
        if kept and line is not END:
            yield from ((one, example) for one in kept_lines(line, width))
        else:
            prose.append(line.strip())


def kept_lines(line: str, width: int) -> list[str]:
    """A line as it is, or, where there is no room, with the remark at its right on lines of its own below it.

    >>> kept_lines("    o = q S         the state is read", 30)
    ['    o = q S', '        the state is read']
    """
    if len(line) <= width:
        return [line.rstrip()]
    left = line[: len(line) - len(line.lstrip())]
    if len(left) > width // 2:
        left = " " * 8
        return folded(line.strip(), width, left)
    cuts = [gap for gap in GAP.finditer(line) if gap.start() <= width]
    if not cuts:
        return folded(line.strip(), width, left, f"{left}    ")
    return [line[: cuts[-1].start()], *folded(line[cuts[-1].end() :], width, f"{left}    ")]


def value_text(value: Any) -> str:
    """A setting's value: large powers of two as such, all else as it is typed.

    >>> [value_text(value) for value in (2**40, 0.5, None, "64MB", (2.0**40, 2))]
    ['2**40', '0.5', 'None', '64MB', '(2**40, 2)']
    """
    if type(value) is tuple:
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    if type(value) in (int, float) and value >= 2**20 and math.log2(value).is_integer():
        return f"2**{math.log2(value):.0f}"
    return str(value)


def card_lines(card: dict[str, Any], width: int) -> Iterator[str]:
    """What a card says below its title."""
    paper = f"{card['paper']} ({card['year']})" if str(card["year"]) not in card["paper"] else card["paper"]
    neutral = ", ".join(f"{name} = {value_text(value)}" for name, value in card["neutral"].items())
    words = {**card, "title": "", "paper": paper, "year": "", "neutral": neutral}
    for label, value in words.items():
        if value:
            yield from labelled(label, value if isinstance(value, str) else ", ".join(value), width)


def number(value: Any) -> str:
    """A measured number with three significant digits, counts and texts as they are.

    >>> [number(value) for value in (0.18751, 12, 1.0, 28096.51, 0.000254539, 7.1e-10, float("inf"), True, None)]
    ['0.188', '12', '1', '28100', '0.000255', '7.1e-10', 'inf', 'yes', 'none']
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value) and 1e3 <= abs(value) < 1e9:
        return f"{float(f'{value:.3g}'):.0f}"
    return f"{value:.3g}"


def measured(value: Any) -> str:
    """Numbers in words, of lists and of names too; what stays on one line is tied.

    >>> measured({"loss": {"full": 0.0062, "moa": 2.3975}, "head": [3, 4]}).replace(TIED, " ")
    'loss (full 0.0062, moa 2.4), head [3, 4]'
    >>> measured(list(range(40)))
    '[0, 1, 2, 3, 4, 5, 6, 7, ... 40 in all]'
    """
    if isinstance(value, dict):
        return ", ".join(pair(name, part) for name, part in value.items())
    if not isinstance(value, list | tuple):
        return number(value)
    shown = value if len(value) <= SHOWN + 4 else value[:SHOWN]
    parts = [f"({measured(part)})" if isinstance(part, dict) else measured(part) for part in shown]
    more = [] if len(shown) == len(value) else [f"... {len(value)} in all"]
    return f"[{', '.join([*parts, *more])}]"


def pair(name: str, value: Any) -> str:
    """`name value`, on one line where it is short."""
    text = f"{name} ({measured(value)})" if isinstance(value, dict) else f"{name} {measured(value)}"
    return text.replace(" ", TIED) if len(text) <= 32 else text.replace(" ", TIED, 1)


def claim_lines(rows: Sequence[dict], width: int) -> Iterator[str]:
    """Statement and bound of a claim, then a line for each model, the one that decides first: verdict and numbers."""
    yield from labelled("claim", rows[0]["statement"], width)
    yield from labelled("bound", rows[0]["bound"], width)
    for at, row in enumerate(rows):
        on = f" on {row['model']}" if "model" in row else ""
        found = measured(row["measured"])
        said = f"{row['verdict']}{on}: {found}" if found else f"{row['verdict']}{on}"
        yield from labelled("" if at else "measured", said, width)
        if row.get("note"):
            yield from labelled("", row["note"], width)


def middle_cut(text: str, most: int) -> str:
    """A long text without its middle; ends of lines are shown as marks.

    >>> middle_cut("one two three four\\nfive", 12)
    'one tw ... ⏎five'
    """
    text = text.strip("\n")
    if len(text) > most:
        text = f"{text[: most // 2].rstrip()} ... {text[len(text) - (most - most // 2 - 1) :].lstrip(' ')}"
    return text.replace("\n", "⏎")


def ids_text(ids: Iterable[int], most: int = 16) -> str:
    """The first of many ids."""
    ids = list(ids)
    return " ".join(map(str, ids[:most])) + (f" ... {len(ids)} in all" if len(ids) > most else "")
