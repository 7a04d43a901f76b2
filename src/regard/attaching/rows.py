"""Rows of a batch: what a layer and a page remember, for those that stay."""

from typing import Any

from torch import Tensor

from regard.core.trees import tree_map


def select_rows(memory: dict, rows: Tensor) -> dict:
    """A layer's memory for these rows of the batch: its tensors, those of nested dicts too, lead with 1 or B."""
    return {
        name: select_rows(x, rows)
        if isinstance(x, dict)
        else x.index_select(0, rows)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] > 1
        else x
        for name, x in memory.items()
    }


def follow(memory: Any, rows: Tensor, batch: int) -> Any:
    """What a page prepared, for these rows of a batch: its tensors lead with the batch; those that lead with 1 stay."""

    def chosen(x: Tensor) -> Tensor:
        return x.index_select(0, rows.to(x.device)) if x.dim() and len(x) == batch else x

    return tree_map(chosen, memory)
