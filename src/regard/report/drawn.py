"""Rectangles and words as SVG and as PNG. PNG has letters of its own (`pixels.py`): no library draws them."""

import html
from dataclasses import dataclass
from typing import Protocol

from regard.report.pixels import Canvas, text_width

INK, SOFT = "#333333", "#777777"
FONT = 'ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace'
# of a letter, as parts of its height: what a line of text takes
WIDE, LINE = 0.6, 1.4


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Words:
    """Text from x to the right, or to the left where `end`, on the line y."""

    x: float
    y: float
    text: str
    size: int
    colour: str = INK
    end: bool = False


class Picture(Protocol):
    """What can be drawn: a title, and width, height and what stands there; and as lines of a terminal."""

    @property
    def title(self) -> str: ...

    def layout(self) -> tuple[int, int, list[Box | Words]]: ...

    def lines(self, width: int = 80) -> list[str]: ...

    def facts(self) -> dict: ...


def svg(picture: Picture) -> str:
    """A document by itself; it fills the width that it is given."""
    width, height, parts = picture.layout()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'{head} style="max-width: 100%; height: auto" font-family="{html.escape(FONT)}" role="img">',
        f"<title>{html.escape(picture.title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for part in parts:
        if isinstance(part, Box):
            where = f'x="{part.x:g}" y="{part.y:g}" width="{part.width:g}" height="{part.height:g}"'
            lines.append(f'<rect {where} fill="{part.colour}"/>')
        else:
            how = f'font-size="{part.size}" fill="{part.colour}"' + ' text-anchor="end"' * part.end
            lines.append(f'<text x="{part.x:g}" y="{part.y:g}" {how}>{html.escape(part.text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def png(picture: Picture) -> bytes:
    width, height, parts = picture.layout()
    canvas = Canvas(width, height)
    for part in parts:
        if isinstance(part, Box):
            canvas.box(round(part.x), round(part.y), round(part.width), round(part.height), part.colour)
        else:
            x = part.x - text_width(part.text) if part.end else part.x
            canvas.text(round(x), round(part.y), part.text, part.colour)
    return canvas.png()
