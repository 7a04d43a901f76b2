"""What `regard explain` found, in words: one plain sentence, what to know before trusting it, and the facts.

A head stands out where the lower end of its interval lies above 0 and above the upper end of every control. All words
follow from this one rule, so that the page, the terminal and the notebook say the same.

Tokens are set between two marks that no token can hold (`quoted`): a page turns them into an element that keeps text
from right to left to itself, the terminal leaves them out.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.report.words import NONE, listing, number, plural

Found = Mapping[str, Any]
FIRST, LAST = "\u2068", "\u2069"  # around a token in our own sentences
NAMED, FEW = 3, 5  # heads that are named; fewer pairs than this make a poor interval
MARKS = {"\n": "↵", "\t": "⇥"}
HIDDEN = re.compile(r"[^\S ]|[^\w\s!-~]")  # what may be no printable character


def mark(character: str) -> str:
    """A character that would not be seen, or would change how its neighbours are, as one that can be read."""
    return character if character.isprintable() else MARKS.get(character, f"[U+{ord(character):04X}]")


def visible(text: object) -> str:
    """Text on one line in which every character is seen.

    >>> visible("a\\n\\u202eb\\x1b"), visible(" ")
    ('a↵[U+202E]b[U+001B]', ' ')
    """
    return HIDDEN.sub(lambda found: mark(found[0]), str(text))


def quoted(token: object, most: int = 40) -> str:
    """A token inside a sentence."""
    text = visible(token)
    text = text.replace(" ", "␣") if not text.strip() else text
    return f"{FIRST}'{text if len(text) <= most else text[: most - 1] + '…'}'{LAST}"


def plain(text: str, space: str = " ") -> str:
    """A sentence for the terminal; `space` stands where no line may break: inside of a token, and before a per cent."""
    text = re.sub(f"{FIRST}(.*?){LAST}", lambda found: found[1].replace(" ", space), text)
    return text.replace(" %", f"{space}%")


def as_html(text: str) -> str:
    """A sentence for a page: escaped, its tokens kept to themselves, numbers on one line with their per cent."""
    return escape(text).replace(" %", "&nbsp;%").replace(FIRST, "<bdi>").replace(LAST, "</bdi>")


def amounts(*values: object) -> list[str]:
    """Numbers that are read together, with as many decimals as the largest of them asks for.

    >>> amounts(0.412, 0.3, -0.02), amounts(0.004), amounts(1234.5), amounts(None), amounts(-0.0001, 0.3), amounts(0.0)
    (['0.41', '0.30', '−0.02'], ['0.004'], ['1,234'], ['–'], ['0.00', '0.30'], ['0'])
    """
    known = [v for v in map(number, values) if v is not None]
    top = max(map(abs, known), default=0.0)
    places = next(
        (d for d, least in ((0, 99.5), (1, 9.95), (2, 0.015), (3, 0.0015)) if top >= least), 4 if top else 0
    )
    return [NONE if v is None else written(v, places) for v in map(number, values)]


def written(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.removeprefix("-")


def amount(value: object) -> str:
    return amounts(value)[0]


def with_interval(row: Found, unit: str = "") -> str:
    """A mean with what is known of its interval.

    >>> with_interval({"mean": 0.41, "low": 0.3, "high": 0.52}, " of the effect")
    '0.41 of the effect, 95 % 0.30 to 0.52'
    """
    mean, low, high = amounts(row.get("mean"), row.get("low"), row.get("high"))
    known = number(row.get("low")) is not None and number(row.get("high")) is not None
    return f"{mean}{unit}, 95 % {low} to {high}" if known else f"{mean}{unit}, no interval"


def head_name(head: Found) -> str:
    return f"layer {head['layer']} head {head['head']}"


def unit(found: Found) -> str:
    """What an effect is counted in."""
    effects = found.get("effects") or {}
    if effects.get("normalised", False):
        return " of the effect"
    return f" in {metric(found)}" if effects else ""


def metric(found: Found) -> str:
    return visible(found.get("metric") or "metric")


def value(row: Found, key: str, default: float) -> float:
    known = number(row.get(key))
    return default if known is None else known


def controls(found: Found) -> list[Found]:
    return [row for row in found.get("controls") or [] if row.get("control")]


def reach(rows: Sequence[Found]) -> tuple[float, float]:
    """How far the controls go, below and above 0."""
    ends = [(value(r, "low", value(r, "mean", 0.0)), value(r, "high", value(r, "mean", 0.0))) for r in rows]
    return min([0.0, *(low for low, _ in ends)]), max([0.0, *(high for _, high in ends)])


def strongest(rows: Sequence[Found]) -> Found:
    return max(rows, key=lambda r: value(r, "high", value(r, "mean", 0.0)))


def by_effect(found: Found) -> list[Found]:
    return sorted(found.get("heads") or [], key=lambda head: -abs(value(head, "mean", 0.0)))


def above(row: Found, limit: float) -> bool:
    low = number(row.get("low"))
    return low is not None and low > limit


def below(row: Found, limit: float) -> bool:
    high = number(row.get("high"))
    return high is not None and high < limit


def standing(found: Found) -> list[Found]:
    """The heads that stand out for the answer, strongest first."""
    limit = reach(controls(found))[1]
    return [head for head in by_effect(found) if above(head, limit)]


def against(found: Found) -> list[Found]:
    limit = reach(controls(found))[0]
    return [head for head in by_effect(found) if below(head, limit)]


def answer(found: Found) -> str:
    foil = found.get("foil")
    return f"The answer {quoted(found['target'])}" + (f" over {quoted(foil)}" if foil is not None else "")


def sentences(found: Found) -> list[str]:
    """The plain answer: heads, tokens, and what their controls carry."""
    heads = " ".join(part for part in (heads_sentence(found), against_sentence(found)) if part)
    said = [part for part in (heads, tokens_sentence(found)) if part]
    return said or [f"{answer(found)}: neither heads nor tokens were measured."]


def heads_sentence(found: Found) -> str:
    heads, out = by_effect(found), standing(found)
    if not heads:
        return ""
    if out:
        named = [f"{head_name(h)} ({with_interval(h, unit(found))})" for h in out[:NAMED]]
        more = [plural(len(out) - NAMED, "more head")] if len(out) > NAMED else []
        return f"{answer(found)} rests on {listing([*named, *more])}; {control_clause(found)}."
    return no_head_sentence(found, max(heads, key=lambda head: value(head, "mean", 0.0)))


def control_clause(found: Found) -> str:
    rows = controls(found)
    if not rows:
        return "no control was measured"
    row = strongest(rows)
    return f"the control ({visible(row['name'])}) carries {with_interval(row)}"


def no_head_sentence(found: Found, top: Found) -> str:
    """No head by itself; together they may."""
    limit = reach(controls(found))[1]
    groups = [r for r in found.get("controls") or [] if not r.get("control") and above(r, limit)]
    if groups:
        group = strongest(groups)
        carried = f"{visible(group['name'])} carry {with_interval(group, unit(found))}"
        return f"{answer(found)} rests on no single head that stands out; {carried}; {control_clause(found)}."
    said = f"{head_name(top)}, carries {with_interval(top, unit(found))}"
    low, high = number(top.get("low")), number(top.get("high"))
    if low is None or high is None:
        return f"{answer(found)}: the strongest head, {said}, so nothing is said about chance; {control_clause(found)}."
    why = " (an interval that includes 0)" if low <= 0 <= high else ""
    stands = "for it" if against(found) else "from its control" if controls(found) else "from 0"
    return (
        f"{answer(found)}: no head stands out {stands}. The strongest, {said}{why}; {control_clause(found)}."
    )


def against_sentence(found: Found) -> str:
    heads = against(found)
    if not heads:
        return ""
    more = f" and {plural(len(heads) - 1, 'more head')}" if len(heads) > 1 else ""
    verb = "work" if more else "works"
    return f"Against it {verb} {head_name(heads[0])} ({with_interval(heads[0], unit(found))}){more}."


# the text


def best_source(found: Found) -> Found | None:
    """The method whose scores foresee best what removing tokens does: by LDS, or else by its drop."""
    rows = [s for s in found.get("sources") or [] if not s.get("control")]
    return max(rows, key=lambda s: (lds(s), top_drop(s)), default=None)


def lds(source: Found) -> float:
    return value(source.get("lds") or {}, "mean", float("-inf"))


def top_drop(source: Found) -> float:
    return max(map(float, filter(None, (source.get("drop") or {}).get("mean") or [])), default=float("-inf"))


def top_tokens(scores: Sequence[float | None], most: int) -> list[int]:
    """The places of the highest scores, of those above 0."""
    known = [(-v, i) for i, v in enumerate(scores) if v is not None and v > 0]
    return [i for _, i in sorted(known)[:most]]


def weighty(scores: Sequence[float | None], most: int) -> list[int]:
    """The top tokens that are worth a name: none with less than a quarter of the highest score.

    >>> weighty([0.1, 0.9, -2.0, 0.3, None], 3)
    [1, 3]
    """
    known = [0.0 if v is None else v for v in scores]
    return [i for i in top_tokens(scores, most) if known[i] >= 0.25 * max(known)]


def token_name(found: Found, place: int, most: int = 40) -> str:
    """A token by its text, one of an image by its place."""
    roles = found.get("token_roles")
    return (
        f"image token {place}" if roles and roles[place] == "image" else quoted(found["tokens"][place], most)
    )


def drop_at(source: Found | None, k: int) -> Found | None:
    """What removing the top `k` tokens costs."""
    drop = (source or {}).get("drop") or {}
    if k not in (drop.get("k") or []):
        return None
    at = drop["k"].index(k)
    return {key: (drop.get(key) or [None] * len(drop["k"]))[at] for key in ("mean", "low", "high")}


def tokens_sentence(found: Found) -> str:
    """The tokens that the best method names, and what it costs to remove them beside random ones."""
    source = best_source(found)
    if source is None:
        return ""
    ks = (source.get("drop") or {}).get("k") or []
    k = max((k for k in ks if k <= 4), default=min(ks, default=NAMED))
    named = weighty(source["scores"], min(k, 4))
    if not named:
        return f"No token has a score above 0 by {visible(source['method'])}."
    first = f"Of the text, {listing(token_name(found, i) for i in named)} weigh{'s' * (len(named) == 1)} most"
    first += f" (by {visible(source['method'])})"
    removed = drop_at(source, k)
    return f"{first}{removal_clause(found, removed, k)}." if removed else f"{first}."


def removal_clause(found: Found, removed: Found, k: int) -> str:
    ours = f"; without {'it' if k == 1 else f'the top {k}'} the {metric(found)} falls by {with_interval(removed)}"
    controls = [(s, drop_at(s, k)) for s in found["sources"] if s.get("control")]
    control, chance = max(
        ((s, d) for s, d in controls if d), key=lambda c: c[1]["mean"], default=(None, None)
    )
    if control is None or chance is None:
        return ours
    name = visible(control["method"])
    how = "at random" if name == "random" else f"by {name} (a control)"
    theirs = f", without {k} {how} by {with_interval(chance)}"
    apart = above(removed, max(0.0, value(chance, "high", value(chance, "mean", 0.0))))
    return ours + theirs + ("" if apart else ": the two do not stand apart")


# what to know, and the facts


def notes(found: Found) -> list[str]:
    """When the numbers say less than they seem to."""
    said, name = [], metric(found)
    clean, corrupt = number(found.get("clean")), number(found.get("corrupt"))
    if found.get("foil") is not None and clean is not None and clean <= 0:
        said.append(
            f"On the prompt itself the model prefers {quoted(found['foil'])} ({name} {amount(clean)}): what is "
            "explained is a preference that it does not have."
        )
    if clean is not None and corrupt is not None and clean <= corrupt:
        said.append(
            f"The corruption does not lower the {name} ({amount(clean)} before, {amount(corrupt)} after): effects "
            "relative to it mean little."
        )
    pairs = number(found.get("pairs"))
    if pairs is not None and pairs < FEW:
        said.append(f"Intervals are over {plural(int(pairs), 'pair')}: so few say little about chance.")
    agreement = number((found.get("effects") or {}).get("spearman"))
    if agreement is not None and agreement < 0.5:
        said.append(
            f"Screened effects agree little with exact ones (rank correlation {amount(agreement)}): heads that were "
            "screened out may matter."
        )
    return said


DIRECTIONS = {
    "denoise": "denoise: a part of the clean run is set into the corrupted one; what it restores is its effect",
    "noise": "noise: a part of the corrupted run is set into the clean one; what it destroys is its effect",
}


def facts(found: Found) -> list[tuple[str, str]]:
    """What was explained, field by field; what is absent is left out."""
    revision = f" at {found['revision']}" if found.get("revision") else ""
    direction, foil = str(found.get("direction") or ""), found.get("foil")
    shown = [
        ("Model", f"{found['model']}{revision}" if found.get("model") else ""),
        ("Prompt", found.get("prompt_name")),
        ("Tokens", f"{len(found['tokens']):,}"),
        ("Answer", quoted(found["target"]) + (f" over {quoted(foil)}" if foil is not None else "")),
        ("Metric", found.get("metric")),
        ("On the clean prompt", None if found.get("clean") is None else amount(found["clean"])),
        ("On the corrupted one", None if found.get("corrupt") is None else amount(found["corrupt"])),
        ("Corruption", found.get("corruption")),
        ("Direction", DIRECTIONS.get(direction, direction)),
        ("Pairs", None if found.get("pairs") is None else f"{found['pairs']}, behind every interval"),
        ("Time", None if found.get("seconds") is None else f"{amount(found['seconds'])} s"),
    ]
    kept = (FIRST, LAST)
    return [
        (name, text if str(text)[:1] in kept else visible(text))
        for name, text in shown
        if text not in (None, "")
    ]
