"""States of mechanisms: tensors, or tuples, lists and dicts of them, whatever a page makes of them."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(change: Callable, *states: Any) -> Any:
    """The same structure with `change` of the tensors at each place; what is no tensor stays as in the first."""
    first = states[0]
    if isinstance(first, Tensor):
        return change(*states)
    if isinstance(first, Mapping):
        return {name: mapped(change, *(s[name] for s in states)) for name in first}
    if isinstance(first, tuple | list):
        parts = [mapped(change, *ps) for ps in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def leaves(state: Any) -> list[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, tuple | list) else ()
    return [leaf for part in parts for leaf in leaves(part)]
