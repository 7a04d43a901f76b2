"""Errors that name the rule and the value."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
MANY = 60  # names that no error lists


class Unreachable(TypeError):
    """A model, or a part of one, whose attention regard cannot take over. The message names the part."""


class Unsupported(TypeError):
    """A method that this pattern, model or way of generating cannot do. The message names both."""


class NotInstalled(ValueError):
    """Something that a package or a file would bring, and neither is here. The message says how to get it."""


class NeverFired(RuntimeError):
    """An edit that was attached and changed nothing: its layer, head, row or phase never came."""


def show(value: object) -> str:
    """A value in a few words: tensors as dtype and shape, everything else as repr, cut at 120 characters."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def require(condition: object, rule: str, **values: object) -> None:
    """Raise ValueError with the rule and the values unless the condition holds.

    >>> require(1 < 0, "1 < 0", one=1)
    Traceback (most recent call last):
    ...
    ValueError: must hold: 1 < 0 (one=1)
    """
    if not condition:
        raise broken(rule, values)


def broken(rule: str, values: Mapping[str, object]) -> ValueError:
    """The error for a rule that does not hold."""
    details = ", ".join(f"{name}={show(value)}" for name, value in values.items())
    return ValueError(f"must hold: {rule}" + (f" ({details})" if details else ""))


def present(value: T | None, rule: str, **values: object) -> T:
    """The value, where there has to be one; ValueError with the rule and the values if it is None.

    >>> present(None, "one of the two is set", tokens=None)
    Traceback (most recent call last):
    ...
    ValueError: must hold: one of the two is set (tokens=None)
    """
    if value is None:
        raise broken(rule, values)
    return value


def near(name: str, names: Iterable[str]) -> str:
    """The names that `name` may have meant, in words that end an error message.

    >>> near("streaming_lm", ["streaming_llm", "h2o"])
    'near names: streaming_llm'
    >>> near("zzz", map(str, range(218)))
    'none of the 218 known names is near'
    """
    names = sorted(names)
    matches = get_close_matches(name, names, n=3, cutoff=0.5) or [n for n in names if name in n][:3]
    if not matches and len(names) > MANY:
        return f"none of the {len(names)} known names is near"
    return f"near names: {', '.join(matches)}" if matches else f"known: {', '.join(names)}"


def unknown(what: str, name: str, names: Iterable[str]) -> KeyError:
    """The error for a wrong name: `raise unknown("method", name, pages())`."""
    return KeyError(f"no {what} is called {name!r}; {near(name, names)}")
