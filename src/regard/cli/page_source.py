"""What the file of a page says of itself: its docstring, and the comment at each of its settings."""

import ast
import io
import re
import sys
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

REMARKS = ("noqa", "fmt:", "type:", "mypy:", "pragma:")  # comments that speak to tools


def docstring(path: Path) -> str:
    """The docstring of a file, without the indentation that all of its lines share; "" if it has none."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""


def options(page: Any) -> list[dict[str, Any]]:
    """{name, default, says} of each setting of a page, in their order; "" where nothing is said.

    Of pages laid over others the names are those that are typed: `adakv.floor`.
    """
    return options_of(page.config(), "")


def options_of(default: Any, prefix: str) -> list[dict[str, Any]]:
    said, found = explanations(type(default)), []
    for f in fields(default):
        value = getattr(default, f.name)
        if is_dataclass(value) and not isinstance(value, type) and f.name not in said:
            found += options_of(value, f"{prefix}{f.name}.")
        else:
            found.append({"name": prefix + f.name, "default": value, "says": said.get(f.name, "")})
    return found


def explanations(config: type) -> dict[str, str]:
    """Field -> what the source says of it: beside it or above it, else in the docstring of its class."""
    said: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if is_dataclass(cls) and file:
            said |= explained_in(Path(file).read_text(encoding="utf8"), cls.__name__)
    return said


def explained_in(source: str, name: str) -> dict[str, str]:
    """The same of the class of this name in a source.

    >>> explained_in('''
    ... class Config:
    ...     # of the text, not of the cache
    ...     window: int = 8
    ...     pool: int = 7  # neighbours
    ...     rank: int = 16
    ... ''', "Config")
    {'window': 'of the text, not of the cache', 'pool': 'neighbours'}
    """
    classes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == name)
    body = next(classes, None)
    if body is None:
        return {}
    comments, said = comments_of(source), in_doc(ast.get_docstring(body) or "")
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = [comments[i][0] for i in range(node.lineno, (node.end_lineno or 0) + 1) if i in comments]
            if text := " ".join(beside or above(comments, node.lineno)):
                said[node.target.id] = text
    return said


def comments_of(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (its comment, whether the line has nothing else); none that speak to tools."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("#: ")
        if token.type == tokenize.COMMENT and not text.startswith(REMARKS):
            found[token.start[0]] = text, token.line.lstrip().startswith("#")
    return found


def above(comments: dict[int, tuple[str, bool]], line: int) -> list[str]:
    """The comments on lines of their own that end right above a line."""
    lines: list[str] = []
    while comments.get(line - 1, ("", False))[1]:
        line -= 1
        lines.insert(0, comments[line][0])
    return lines


def in_doc(doc: str) -> dict[str, str]:
    """Name -> text of the table in a docstring, whose lines are `name   text`, with more lines indented below.

    >>> in_doc("Blocks.\\n\\nblock_q    queries that\\n           choose together\\nblock_k    keys")
    {'block_q': 'queries that choose together', 'block_k': 'keys'}
    """
    said: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        row = re.match(r"([a-z_]\w*) {2,}(\S.*)", line)
        if row:
            name = row[1]
            said[name] = row[2]
        elif name and line.startswith(" " * 8):
            said[name] += f" {line.strip()}"
        else:
            name = ""
    return said
