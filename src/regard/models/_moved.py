"""Modules that moved: their old names go on for one release, with a warning."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def forward(old: str, *new: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`: names are those of the modules `new`."""

    def getter(name: str) -> Any:
        for module in () if name.startswith("__") else new:
            if hasattr(import_module(module), name):
                warnings.warn(f"{old}.{name} is now {module}.{name}", DeprecationWarning, stacklevel=2)
                return getattr(import_module(module), name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}; see {' and '.join(new)}")

    return getter
