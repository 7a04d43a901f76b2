"""Settings are held to the annotations of a page's Config: what does not fit is an error with rule and value."""

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from regard.core.errors import near, require, show

MISFIT = object()
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", NoneType: "None"}


def fitted(title: str, config: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as Config takes them: lists as tuples, whole numbers of other libraries as int.

    A name that Config does not have, and a value that its annotation does not allow, are a ValueError.
    """
    names, wanted = [f.name for f in fields(config)], annotations(config)
    settings = nested(config, settings)
    for name in settings:
        if name not in names:
            raise ValueError(f"{title} has no setting {name!r}; {near(name, names)}")
    return {name: fit(title, name, value, wanted[name]) for name, value in settings.items()}


@cache
def annotations(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def nested(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a part's Config in their place: {"floor": 0.3} is {"adakv": {"floor": 0.3}}.

    A name that the Config itself has is its own; one that several parts have says whose it is: "adakv.floor".
    """
    own = {f.name for f in fields(config)}
    parts = {f.name: f.type for f in fields(config) if isinstance(f.type, type) and is_dataclass(f.type)}
    inner = {name: {f.name for f in fields(part)} for name, part in parts.items()}
    result: dict[str, Any] = {}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        part, _, rest = name.partition(".")
        owners = [p for p, names in inner.items() if name in names]
        if rest and part in parts:
            changed.setdefault(part, {})[rest] = value
        elif name not in own and len(owners) == 1:
            changed.setdefault(owners[0], {})[name] = value
        else:
            require(name in own or not owners, f"{name} says of which part: {owners}", **{name: value})
            result[name] = value
    for part, values in changed.items():
        before = result.get(part, {})
        result[part] = {**(vars(before) if is_dataclass(before) else before), **values}
    return result


def fit(title: str, name: str, value: Any, wanted: Any) -> Any:
    """The value as `wanted` says, or ValueError.

    >>> fit("Some method", "grid", [2, 3], tuple[int, int] | None)
    (2, 3)
    >>> fit("Some method", "rank", True, int)
    Traceback (most recent call last):
    ...
    ValueError: must hold: Some method: rank is a whole number (rank=True)
    >>> fit("Some method", "decay", "papr", Literal["paper", "slopes"])
    Traceback (most recent call last):
    ...
    ValueError: Some method: decay is 'paper' or 'slopes', not 'papr'; near names: paper
    """
    result = converted(value, wanted)
    choices = [text for option in options(wanted) for text in choices_of(option)]
    if result is MISFIT and choices and isinstance(value, str):
        raise ValueError(f"{title}: {name} is {words(wanted)}, not {show(value)}; {near(value, choices)}")
    require(result is not MISFIT, f"{title}: {name} is {words(wanted)}", **{name: value})
    return result


def converted(value: Any, wanted: Any) -> Any:
    """The value as this annotation stores it, or MISFIT."""
    if wanted is Any:
        return value
    if len(options(wanted)) > 1:
        results = (converted(value, option) for option in options(wanted))
        return next((result for result in results if result is not MISFIT), MISFIT)
    if get_origin(wanted) is Literal:
        same = [c for c in get_args(wanted) if type(c) is type(value) and c == value]
        return value if same else MISFIT
    if get_origin(wanted) is tuple:
        return converted_parts(value, get_args(wanted))
    if isinstance(value, dict) and isinstance(wanted, type) and is_dataclass(wanted):
        return wanted(**fitted(wanted.__name__, wanted, value))
    if wanted in (int, float):
        return converted_number(value, wanted)
    return value if isinstance(value, get_origin(wanted) or wanted) else MISFIT


def converted_number(value: Any, wanted: type) -> Any:
    """True and False are no numbers here, and what is not a number (NaN) is none."""
    if isinstance(value, bool) or not isinstance(value, Integral if wanted is int else Real):
        return MISFIT
    if isinstance(value, Integral):
        return int(value)
    return MISFIT if math.isnan(value) else float(value)


def converted_parts(value: Any, parts: tuple) -> Any:
    """A tuple, or a list as JSON has it, part by part."""
    if not isinstance(value, tuple | list):
        return MISFIT
    each = parts[:1] * len(value) if parts[1:] == (...,) else parts
    if len(each) != len(value):
        return MISFIT
    results = tuple(converted(part, wanted) for part, wanted in zip(value, each))
    return MISFIT if any(result is MISFIT for result in results) else results


def options(wanted: Any) -> tuple:
    """The annotations of which one has to fit."""
    return get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)


def choices_of(option: Any) -> Iterable[str]:
    return [c for c in get_args(option) if isinstance(c, str)] if get_origin(option) is Literal else ()


def words(wanted: Any) -> str:
    """An annotation in words.

    >>> words(tuple[int, ...] | None)
    'a tuple, each part a whole number, or None'
    """
    return " or ".join(dict.fromkeys(word(option) for option in options(wanted)))


def word(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if get_origin(option) is not tuple:
        return WORDS.get(option, getattr(option, "__name__", str(option)))
    parts = get_args(option)
    if parts[1:] == (...,):
        return f"a tuple, each part {words(parts[0])},"
    return f"a tuple ({', '.join(words(part) for part in parts)})"
