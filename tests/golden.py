"""A result in which every number is another, and readers of what is drawn of it: tables by heads, figures, maps."""

import base64
import gzip
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from regard.report import Result, show, to_html, to_markdown

DEPTHS, LENGTHS, FULL = (0.0, 0.5, 1.0), (256, 512), 0.8
# (label, budget) -> scores of the needle by length and depth, quality of the text by length
SCORES: dict[tuple[str, Any], tuple] = {
    ("full", None): ({256: (0.8, 0.8, 0.8), 512: (0.8, 0.8, 0.8)}, (1.0, 1.0)),
    ("alpha", 0.1): ({256: (0.8, 0.4, 0.6), 512: (0.2, 0.1, 0.3)}, (0.88, 0.92)),
    ("alpha", 512): ({256: (0.8, 0.78, 0.79), 512: (0.77, 0.76, 0.804)}, (1.01, 0.99)),
    ("beta", "900KB"): ({256: (0.7, 0.5, 0.6), 512: (0.4, 0.35, 0.426)}, (0.84, 0.88)),
    ("beta", "64MB"): ({256: (0.79, 0.75, 0.77), 512: (0.74, 0.71, 0.704)}, (1.0, 0.98)),
    ("gamma", 0.25): ({256: (0.3, 0.5, 0.136)}, (0.72, 0.68)),
}
# relative to full attention: needle, text, quality, held, read, decode, its spread, prefill, its spread, same token, KL
NUMBERS = {
    ("full", None): (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0),
    ("alpha", 0.1): (0.50, 0.90, 0.70, 0.11, 0.12, 0.31, 0.01, 1.41, 0.02, 0.51, 0.061),
    ("alpha", 512): (0.98, 1.00, 0.99, 0.23, 0.24, 0.53, 0.03, 1.63, 0.04, 0.82, 0.013),
    ("beta", "900KB"): (0.62, 0.86, 0.74, 0.35, 0.27, 0.75, 0.05, 1.85, 0.06, 0.67, 0.048),
    ("beta", "64MB"): (0.93, 0.99, 0.96, 0.47, 0.16, 0.87, 0.07, 1.97, 0.08, 0.79, 0.025),
    ("gamma", 0.25): (0.39, 0.70, 1.79 / 3, 0.59, 0.68, 0.99, 0.09, 1.19, 0.05, 0.44, 0.072),
}
BUDGETS = {
    0.1: "10 %",
    0.25: "25 %",
    512: "512 tok",
    "900KB": "900 KB",
    "64MB": "64 MB",
    None: "",
}  # in their order
PERCENT = {
    ("full", None): "100 % 100 % 100 % 100 % 100 %",
    ("alpha", 0.1): "50 % 90 % 70 % 11 % 12 %",
    ("alpha", 512): "98 % 100 % 99 % 23 % 24 %",
    ("beta", "900KB"): "62 % 86 % 74 % 35 % 27 %",
    ("beta", "64MB"): "93 % 99 % 96 % 47 % 16 %",
    ("gamma", 0.25): "39 % 70 % 60 % 59 % 68 %",
}  # needle, text, quality, held, read, as they are printed


def row(label: str, budget: Any, task: str, length: int) -> dict:
    needle, text = SCORES[label, budget]
    *_, held, read, decode, around, prefill, wide, same, kl = NUMBERS[label, budget]
    facts = {"kind": "cell", "key": f"{label}/{budget}/{task}/{length}", "method": label, "label": label}
    facts |= {"budget": budget, "task": task, "length": length, "seed": 0, "status": "ok", "error": ""}
    facts |= {"bytes_full": 1000 * length, "bytes_held": held * 1000 * length}
    facts |= {"bytes_read_full": 700 * length, "bytes_read": read * 700 * length}
    facts |= {"decode_ratio": decode, "decode_spread": around, "decode_ms": 40 * decode}
    facts |= {"prefill_ratio": prefill, "prefill_spread": wide, "agreement": same, "kl": kl}
    if task == "text":
        quality = text[LENGTHS.index(length)]
        apart = (1, 1, 1) if label == "full" else (1.5, 0.9, 1 / (1.5 * 0.9))  # their geometric mean is 1
        samples = [{"depth": None, "score": quality * factor} for factor in apart]
        return facts | {"metric": "nll", "samples": samples} | around_quality(quality)
    if length not in needle:
        return facts | {
            "metric": "recall",
            "status": "timeout",
            "error": "too slow",
            "quality": None,
            "samples": [],
        }
    scores = needle[length]
    samples = [
        {"depth": d, "score": s, "answer": f"wanted {d}", "generated": f"{label} {budget} {length} {d}"}
        for d, s in zip(DEPTHS, scores, strict=True)
    ]
    return facts | {"metric": "recall", "samples": samples} | around_quality(sum(scores) / 3)


def around_quality(quality: float) -> dict:
    """With an interval whose ends lie at different distances."""
    return {"quality": quality, "quality_low": quality - 0.07, "quality_high": quality + 0.02}


def golden() -> Result:
    rows = [row(*at, task, n) for at in SCORES for task in ("text", "needle") for n in LENGTHS]
    return Result(
        {"model": "small", "started": "then"}, rows[::-1]
    )  # the order of rows is that in which cells ended


# HTML


class Node:
    """An element of a page: its tag, attributes and what it holds."""

    def __init__(self, tag: str, attributes: dict) -> None:
        self.tag, self.attributes, self.inside = tag, attributes, []

    def all(self, tag: str, css: str | None = None) -> list["Node"]:
        """The elements within of this tag and class, in the page's order."""
        found = []
        for child in self.inside:
            if isinstance(child, Node):
                fits = child.tag == tag and (
                    css is None or css in (child.attributes.get("class") or "").split()
                )
                found += ([child] if fits else []) + child.all(tag, css)
        return found

    @property
    def text(self) -> str:
        parts = (child.text if isinstance(child, Node) else child for child in self.inside)
        return " ".join("".join(parts).split())


class Tree(HTMLParser):
    VOID = ("meta", "input", "br", "link", "img", "path", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("page", {})
        self.open = [self.root]
        # plotly itself is no part of what is read
        self.feed(re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S))

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes))
        self.open[-1].inside.append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].inside.append(Node(tag, dict(attributes)))

    def handle_data(self, data):
        self.open[-1].inside.append(data)

    def handle_endtag(self, tag):
        if tag in [node.tag for node in self.open]:
            while self.open.pop().tag != tag:
                pass


class Page:
    """The page of a result, in parts by their heads."""

    def __init__(self, result: Result) -> None:
        text = to_html(result)
        self.root = Tree(text).root
        self.sections = {s.all("h2")[0].text: s for s in self.root.all("section")}
        self.data = json.loads(re.search(r'id="report-data">(.*?)</script>', text, re.S).group(1))
        self.data["figures"] = unpacked(text, "figures")

    def table(self, section: str, at: int = 0) -> list[dict[str, Node]]:
        """The rows of a table, each a cell by its head."""
        table = self.sections[section].all("table")[at]
        heads = [th.text for th in table.all("th")]
        return [dict(zip(heads, tr.all("td"), strict=True)) for tr in table.all("tr") if tr.all("td")]


def unpacked(page: str, name: str) -> Any:
    """What lies packed in an element of a page: JSON, or a script's text where it is none."""
    bits = re.search(rf'id="{name}">(.*?)</script>', page, re.S).group(1).replace(",", "<")
    text = gzip.decompress(base64.b85decode(bits)).decode() if bits else "{}"
    return json.loads(text) if text.startswith("{") else text


# Text


def markdown_rows(result: Result) -> list[dict[str, str]]:
    lines = [line for line in to_markdown(result).splitlines() if line.startswith("| ")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, cells, strict=True)) for cells in rows]


def terminal_rows(result: Result, width: int = 160) -> list[dict[str, str]]:
    """The first table: a cell is of the head that stands above it."""
    printed = io.StringIO()
    show(result, Console(width=width, file=printed))
    lines = printed.getvalue().splitlines()
    ruler = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    heads = pieces(lines[ruler - 1])
    found = []
    for line in lines[ruler + 1 :]:
        if not line.strip():
            return found
        cells = {}
        for text, left, right in pieces(line):
            (head,) = (h for h, a, b in heads if a < right and left < b)
            cells[head] = text
        found.append(cells)
    return found


def pieces(line: str) -> list[tuple[str, int, int]]:
    """(text, first column, past the last) of what stands two blanks or more apart."""
    return [(m.group(), *m.span()) for m in re.finditer(r"\S+(?: \S+)*", line)]
