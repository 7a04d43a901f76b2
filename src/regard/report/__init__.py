"""A Result as a table in the terminal, an HTML page, Markdown. Plotly is imported when a page is written."""

from regard.report.explanation import explanation_page, explanation_snippet, explanation_text
from regard.report.html import to_html
from regard.report.markdown import to_markdown
from regard.report.result import Result
from regard.report.terminal import show, table

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
