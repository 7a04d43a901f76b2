"""Scores over the tokens of a text: colours behind the words, an overview of a long text, the top tokens in place.

Each token is written once with a class for each method (`a3`: method a, third step of its colour); which of them show
is chosen by a radio button and CSS, without a script. Spaces are real ones with a dot behind them, so that lines break
where they should and what is copied is the text.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from regard.report.explained_words import HIDDEN, amount, amounts, as_html, mark, token_name, visible
from regard.report.words import number, plural

Found = Mapping[str, Any]
Scores = Sequence[float | None]
STEPS = 8
FOR, AGAINST, LOOKS = (232, 132, 60), (84, 155, 214), (38, 166, 128)  # text stays readable on all of them
LONG, TOP, BINS, AROUND = 1500, 30, 200, 7
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKED = re.compile(f"[ &<>\"']|{HIDDEN.pattern}")


def shade(colour: tuple[int, int, int], step: int) -> str:
    """White at step 0, the colour at the last."""
    red, green, blue = (round(255 + (c - 255) * step / STEPS) for c in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def largest(scores: Scores) -> float:
    return max((abs(v) for v in scores if v is not None), default=0.0)


def step(score: float | None, top: float) -> int:
    """The colour of a score, from -STEPS to STEPS, 0 for less than a sixteenth of the largest.

    >>> step(1, 2), step(-2, 2), step(0.1, 2), step(None, 2), step(0, 0)
    (4, -8, 0, 0, 0)
    """
    return 0 if score is None or not top else round(STEPS * score / top)


def level(letter: str, score: float | None, top: float) -> str:
    """The class of a token under one method; none for no colour."""
    at = step(score, top)
    return "" if not at else f"{letter}{at}" if at > 0 else f"{letter}n{-at}"


def rules(letter: str, under: str, positive: tuple[int, int, int] = FOR) -> str:
    """The CSS of one method's classes, where `under` is the selector of what they lie in."""
    sides = (("", positive), ("n", AGAINST))
    return "".join(
        f"{under} .{letter}{side}{i}{{background:{shade(colour, i)}}}"
        for i in range(1, STEPS + 1)
        for side, colour in sides
    )


def token_html(token: str, breaks: bool = False) -> str:
    """A token whose spaces and hidden characters are seen; `breaks` keeps line breaks beside their marks."""
    return MARKED.sub(lambda found: character(found[0], breaks), token)


def character(c: str, breaks: bool) -> str:
    if c == " ":
        return "<u> </u>"
    if c.isprintable():
        return escape(c)
    return f"<s>{mark(c)}</s>" + (c if breaks and c in "\n\t" else "")


def spans(found: Found, sources: Sequence[Found], anchors: bool = False) -> str:
    """The whole text; image tokens are small squares without words."""
    tokens, roles = found["tokens"], found.get("token_roles") or [None] * len(found["tokens"])
    tops = [largest(s["scores"]) for s in sources]
    every = width(len(tokens)) if anchors else 0
    parts = []
    for i, (token, role) in enumerate(zip(tokens, roles, strict=True)):
        at = [s["scores"][i] for s in sources]
        classes = [level(LETTERS[j], score, tops[j]) for j, score in enumerate(at)]
        names = " ".join(filter(None, [*classes, "im" if role == "image" else ""]))
        css = f' class="{names}"' if names else ""
        anchor = f' id="t{i}"' if every and i % every == 0 else ""
        inside = "" if role == "image" else token_html(token, breaks=True)
        parts.append(f'<span{css}{anchor} title="{tip(i, token, role, sources, at)}">{inside}</span>')
    return "".join(parts)


def tip(
    place: int, token: str, role: str | None, sources: Sequence[Found], scores: Sequence[float | None]
) -> str:
    """What the pointer, and a reader of the screen, is told about a token."""
    said = ", ".join(f"{visible(s['method'])} {amount(v)}" for s, v in zip(sources, scores, strict=True))
    what = visible(role) if role else f"'{visible(token)}'"
    return escape(f"token {place} {what}: {said}")


def text_box(inside: str, css: str = "") -> str:
    return (
        f'<div class="text {css}" dir="auto" tabindex="0" role="region" aria-label="The text">{inside}</div>'
    )


def scale(top: float, positive: tuple[int, int, int] = FOR, both: bool = True) -> str:
    """The colours with the numbers at their ends."""
    steps = range(-STEPS if both else 0, STEPS + 1)
    cells = "".join(
        f'<b style="background:{shade(AGAINST if i < 0 else positive, abs(i))}"></b>' for i in steps
    )
    low, high = amounts(-top, top)
    ends = (f"against {low}", f"for {high}") if both else ("0", high)
    return f'<span class="scale">{ends[0]} <span class="steps" aria-hidden="true">{cells}</span> {ends[1]}</span>'


# a long text


def width(tokens: int) -> int:
    """Tokens in a bar of the overview."""
    return max(1, -(-tokens // BINS))


def overview(scores: Scores) -> str:
    """The whole text from left to right: a bar up for what speaks for the answer, one down for what speaks against it.

    A bar is as high as the largest score among its tokens, and leads to them: a sum would drown one token in many.
    """
    wide = width(len(scores))
    bins = [[v for v in scores[i : i + wide] if v is not None] for i in range(0, len(scores), wide)]
    ends = [(max([0.0, *b]), min([0.0, *b])) for b in bins]
    top = largest(scores) or 1.0
    bars = "".join(overview_bar(i, wide, up / top, down / top) for i, (up, down) in enumerate(ends))
    said = f"The largest scores of every {plural(wide, 'token')}, from the first to the last"
    return (
        f'<svg class="overview" viewBox="0 0 {len(bins) * 5} 84" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}"><path d="M0 42H{len(bins) * 5}" stroke="#bbbbb6"/>{bars}</svg>'
        f'<p class="ends"><span>token 0</span><span>{len(scores) // 2:,}</span><span>{len(scores) - 1:,}</span></p>'
    )


def overview_bar(at: int, wide: int, up: float, down: float) -> str:
    parts = [f'<rect class="ground" x="{at * 5}" width="5" height="84"/>']
    if up > 0.005:
        parts.append(
            f'<rect x="{at * 5}" y="{42 - 40 * up:.1f}" width="4.4" height="{40 * up:.1f}" fill="#d55e00"/>'
        )
    if down < -0.005:
        parts.append(f'<rect x="{at * 5}" y="42" width="4.4" height="{-40 * down:.1f}" fill="#0072b2"/>')
    said = f"tokens {at * wide} to {(at + 1) * wide - 1}"
    return f'<a href="#t{at * wide}"><title>{said}</title>{"".join(parts)}</a>'


def top_places(scores: Scores, most: int) -> list[int]:
    """The places of the largest scores, for or against, largest first."""
    known = [(-abs(v), i) for i, v in enumerate(scores) if v]
    return [i for _, i in sorted(known)[:most]]


def context(tokens: Sequence[str], place: int, against: bool = False, around: int = AROUND) -> str:
    """A token among its neighbours, all on one line."""
    before = "".join(map(token_html, tokens[max(0, place - around) : place]))
    after = "".join(map(token_html, tokens[place + 1 : place + 1 + around]))
    start, end = ("…" if place > around else ""), ("…" if place + around + 1 < len(tokens) else "")
    css = ' class="against"' if against else ""
    return f"<bdi>{start}{before}</bdi><mark{css}><bdi>{token_html(tokens[place])}</bdi></mark><bdi>{after}{end}</bdi>"


def top_table(tokens: Sequence[str], scores: Scores, most: int, head: str, least: float = 0.0) -> str:
    """The largest scores with the words around them; `least` is the share of the largest that is worth a row."""
    places = [i for i in top_places(scores, most) if abs(scores[i] or 0.0) >= least * largest(scores)]
    if not places:
        return '<p class="meta">Every score is 0.</p>'
    top = largest(scores)
    body = "".join(
        f'<tr><td class="n">{i:,}</td><td class="n">{amounts(scores[i], top)[0]}</td>'
        f'<td class="around">{context(tokens, i, (scores[i] or 0) < 0)}</td></tr>'
        for i in places
    )
    heads = f'<th class="n">Token</th><th class="n">{escape(head)}</th><th>In its place</th>'
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


# one row of attention


def sink_text(weights: Scores) -> str:
    """What lies on the first token, where heads leave what they do not need.

    >>> sink_text([0.3, 0.7]), sink_text([0.1, 0.9]), sink_text([])
    ('0.30 of the row lies on the first token, the sink.', '0.10 of the row lies on the first token.', '')
    """
    first = number(weights[0]) if weights else None
    if first is None:
        return ""
    return (
        f"{amount(first)} of the row lies on the first token" + (", the sink" if first >= 0.2 else "") + "."
    )


def looked_at(found: Found, weights: Scores, most: int = 4) -> str:
    """The tokens with the largest weights, the first one left out."""
    inside = [0.0, *weights[1:]]
    places = [i for i in top_places(inside, most) if (weights[i] or 0.0) >= 0.1 * largest(inside)]
    said = [f"{token_name(found, i, 24)} {amounts(weights[i], 0.1)[0]}" for i in places]
    return ", ".join(as_html(text) for text in said) or "the first token only"


def strip(found: Found, weights: Scores) -> str:
    """One row of attention over a short text; its colours leave the first token out where that is a sink."""
    inside = [None, *weights[1:]] if (weights[0] or 0) >= 0.2 else weights
    top = largest(inside)
    roles, cells = found.get("token_roles") or [None] * len(weights), []
    for i, (token, weight) in enumerate(zip(found["tokens"], weights, strict=True)):
        image = roles[i] == "image"
        colour = "sink" if inside[i] is None else level("z", weight, top)
        title = escape(f"token {i} '{visible(token)}': {amounts(weight, 0.1)[0]}")
        css = " ".join(filter(None, [colour, "im" * image]))
        cells.append(f'<span class="{css}" title="{title}">{"" if image else token_html(token, True)}</span>')
    return scale(top, LOOKS, both=False) + text_box("".join(cells), "line")
