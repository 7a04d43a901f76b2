"""What the sections of pages are made of: a section with its lead, a plot's place, a cell of a table."""

import re
from html import escape

from regard.report.figures import Figure
from regard.report.words import KEEPS, clean, number, percent


def words(text: str) -> str:
    """Text of ours as HTML; a number stays on one line with its per cent."""
    return escape(text).replace(" %", "&nbsp;%")


def section(title: str, lead: str, body: str) -> str:
    intro = f'<p class="lead">{words(lead)}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{intro}{body}</section>"


def plot(at: str, figure: Figure | None, what: str, caption: str = "") -> str:
    below = f"<figcaption>{words(caption)}</figcaption>" if caption else ""
    if figure is None:
        return f'<figure><p class="meta">{escape(what)}: not measured.</p></figure>'
    return (
        f'<figure><div class="plot" id="{at}" role="img" aria-label="{escape(what)}"></div>{below}</figure>'
    )


def cell(value: object, text: str, css: str = "n") -> str:
    plain = number(value)
    return f'<td class="{css}" data-value="{"" if plain is None else plain}">{escape(text)}</td>'


def share(value: float | None, css: str = "n") -> str:
    return cell(value, percent(value), css + (" short" if value is not None and value < KEEPS - 1e-9 else ""))


def breakable(head: str) -> str:
    """A name that may go on in the next line after each of its parts."""
    return re.sub(r"(?<=[_:,(])(?=.)", "<wbr>", escape(clean(head)))
