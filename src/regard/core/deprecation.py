"""Old public names, for one release: they work, and say what to write instead. CHANGELOG.md lists them."""

import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from regard.core.errors import require


def warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name goes in the next release", DeprecationWarning, stacklevel=3
    )


def renamed(**names: str) -> Callable[[Callable], Callable]:
    """Keyword arguments that have new names: renamed(old="new").

    >>> @renamed(state="initial_state")
    ... def step(initial_state=None):
    ...     return initial_state
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     step(state=3)
    3
    """

    def wrap(function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in [name for name in names if name in options]:
                new = names[old]
                require(
                    new not in options, f"{new}, or its old name {old}, not both", **{new: options.get(new)}
                )
                warn(f"{function.__qualname__}({old}=...)", f"{new}=")
                options[new] = options.pop(old)
            return function(*args, **options)

        return call

    return wrap


def renamed_fields(**names: str) -> Callable[[Any], Any]:
    """Fields of a dataclass that have new names, as arguments and where they are read: renamed_fields(old="new").

    >>> from dataclasses import dataclass
    >>> @renamed_fields(look="statistic")
    ... @dataclass
    ... class Watch:
    ...     statistic: str
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     Watch(look="top1").look
    'top1'
    """

    def wrap(owner: Any) -> Any:
        owner.__init__ = renamed(**names)(owner.__init__)
        for old, new in names.items():
            setattr(owner, old, _old_field(owner.__name__, old, new))
        return owner

    return wrap


def _old_field(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    return property(read)


def moved(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's __getattr__ for names that live elsewhere now: {"old": "regard.new.module:name"}."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].partition(":")
        warn(f"{module}.{name}", f"{where}.{new}")
        return getattr(import_module(where), new)

    return __getattr__
