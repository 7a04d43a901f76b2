"""Methods as they are typed: "streaming_llm:sinks=8,window=64", several of them with commas between."""

import ast
import math
import re
from typing import Any

from regard.core.errors import require

OVER = re.compile(r"\+(?=[A-Za-z_])")  # between two methods; a number's 1e+5 is none
WORDS = {"true": True, "false": False, "none": None, "inf": math.inf}


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of one method.

    >>> parse_spec("tidaldecode:k=32,select=(2, 13),budget=10%")
    ('tidaldecode', {'k': 32, 'select': (2, 13), 'budget': '10%'})

    Of methods laid over one another each may have settings:

    >>> parse_spec("snapkv:window=8+adakv:floor=0.1")
    ('snapkv+adakv', {'window': 8, 'adakv.floor': 0.1})
    """
    (name, settings), *over = [parse_part(part) for part in OVER.split(text)]
    for other, own in over:
        name += f"+{other}"
        settings |= {f"{other}.{key}": value for key, value in own.items()}
    return name, settings


def parse_part(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in split_outside(rest):
        key, equals, value = pair.partition("=")
        require(equals, "settings are written name=value", setting=pair, method=text)
        require(key.strip() not in settings, "every setting is given once", setting=key.strip(), method=text)
        settings[key.strip()] = parse_value(value.strip())
    return name.strip(), settings


def parse_value(text: str) -> Any:
    """A value as Python writes it, true, false, none or inf in any case; any other text as it is.

    >>> [parse_value(text) for text in ("8", "0.5", "True", "none", "inf", "(1, 2)", "64MB")]
    [8, 0.5, True, None, inf, (1, 2), '64MB']
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_specs(text: str | None) -> list[str] | None:
    """The methods of a list: settings hold commas too, so what has "=" and no ":" belongs to the one before.

    >>> split_specs("h2o, streaming_llm:sinks=8,window=64, snapkv")
    ['h2o', 'streaming_llm:sinks=8,window=64', 'snapkv']
    """
    if text is None:
        return None
    specs: list[str] = []
    for part in split_outside(text):
        if specs and "=" in part and ":" not in part.partition("=")[0]:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return specs


def split_list(text: str | None) -> list[str] | None:
    """Parts between commas, without empty ones."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def split_outside(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]
