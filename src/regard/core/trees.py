"""Trees of tensors: states of mechanisms, memories of policies; tuples, lists and dicts of them."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def tree_map(change: Callable, *trees: Any) -> Any:
    """The same structure with `change` of the tensors at each place; what is no tensor stays as in the first.

    >>> import torch
    >>> tree_map(lambda a, b: a + b, {"sum": torch.ones(2)}, {"sum": torch.ones(2)})
    {'sum': tensor([2., 2.])}
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return change(*trees)
    if isinstance(first, Mapping):
        return {name: tree_map(change, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple | list):
        parts = [tree_map(change, *branches) for branches in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def tree_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return [leaf for part in parts for leaf in tree_leaves(part)]
