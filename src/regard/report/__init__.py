"""A Result as a table in the terminal, an HTML page, Markdown. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.report.explanation import explanation_page, explanation_snippet, explanation_text
    from regard.report.html import to_html
    from regard.report.markdown import to_markdown
    from regard.report.result import Result
    from regard.report.terminal import show, table

WHERE = {
    "Result": "result",
    "explanation_page": "explanation",
    "explanation_snippet": "explanation",
    "explanation_text": "explanation",
    "show": "terminal",
    "table": "terminal",
    "to_html": "html",
    "to_markdown": "markdown",
}

__all__ = [
    "Result",
    "explanation_page",
    "explanation_snippet",
    "explanation_text",
    "show",
    "table",
    "to_html",
    "to_markdown",
]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"regard.report.{WHERE[name]}"), name)
