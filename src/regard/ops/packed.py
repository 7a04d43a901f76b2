"""Texts of unequal length packed into one row: cu_seqlens [S + 1] are the places where they begin, and the end.

Texts of one length run together as a batch, so nothing is padded, no text sees another, and every mechanism can. An
empty text has no rows, and leaves the state that it was given; None where that is the start of a text.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import require
from regard.core.trees import tree_leaves, tree_map


def borders(cu_seqlens: Tensor | list[int], tokens: int, name: str) -> list[int]:
    """The lengths of the texts."""
    cuts = torch.as_tensor(cu_seqlens)
    require(cuts.dim() == 1 and len(cuts) >= 2 and not cuts.is_floating_point(),
            f"{name} holds the S + 1 borders of S texts", **{name: cuts})  # fmt: skip
    cuts = cuts.tolist()
    require(cuts[0] == 0 and cuts[-1] == tokens, f"{name} begins at 0 and ends at the number of tokens",
            first=cuts[0], last=cuts[-1], tokens=tokens)  # fmt: skip
    lengths = [b - a for a, b in pairwise(cuts)]
    require(min(lengths) >= 0, f"{name} does not fall: no text has fewer tokens than none", lengths=lengths)
    return lengths


def run_packed(
    run: Callable, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], memories: list[int], *,
    initial_state: Any = None, x: Any = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """(out [1, H, T, E], states) of run(q, k, v, initial_state=..., x=...) -> (out, state) on every text by itself.

    q [1, H, T, D] and k, v [1, G, T', ...] hold the texts end to end. States come, and are given back, as one state
    with a batch of S texts where all have one size, or as a list of S states, one of which may be None.
    """
    require(q.shape[0] == k.shape[0] == 1, "packed texts are one row: q [1, H, T, D]", q=q, k=k)
    count = len(lengths)
    texts = list(zip(*(t.split(size, 2) for t, size in ((q, lengths), (k, memories), (v, memories)))))
    inputs = [None] * count if x is None else split_inputs(x, lengths, memories)
    before = states_of(initial_state, count)
    outs: list[Any] = [None] * count
    ends: list[Any] = [None] * count
    for shape in dict.fromkeys(zip(lengths, memories, strict=True)):
        if 0 in shape:
            for i in (i for i in range(count) if (lengths[i], memories[i]) == shape):
                # what sees nothing is zero
                outs[i], ends[i] = v.new_zeros(1, q.shape[1], shape[0], v.shape[3]), before[i]
            continue
        for members in groups([i for i in range(count) if (lengths[i], memories[i]) == shape], before):
            batch = [torch.cat(parts) for parts in zip(*(texts[i] for i in members))]
            state = joined([before[i] for i in members])
            out, end = run(*batch, initial_state=state, x=joined([inputs[i] for i in members]))
            for row, i in enumerate(members):
                outs[i], ends[i] = out[row : row + 1], picked(end, row)
    return torch.cat(outs, dim=2), merged(ends)


def groups(members: list[int], before: list[Any]) -> list[list[int]]:
    """Texts whose states have one size may run together."""
    by_size: dict[Any, list[int]] = {}
    for i in members:
        by_size.setdefault(sizes_of(before[i]), []).append(i)
    return list(by_size.values())


def split_inputs(x: Any, lengths: list[int], memories: list[int]) -> list[Any]:
    if isinstance(x, tuple):
        return list(zip(x[0].split(lengths, 1), x[1].split(memories, 1), strict=True))
    return list(x.split(lengths, 1))


def states_of(state: Any, count: int) -> list[Any]:
    if state is None:
        return [None] * count
    if isinstance(state, list):
        require(
            len(state) == count, "a list of states holds one for every text", states=len(state), texts=count
        )
        return state
    return [picked(state, i) for i in range(count)]


def picked(state: Any, row: int) -> Any:
    return tree_map(lambda t: t[row : row + 1], state)


def joined(states: list[Any]) -> Any:
    """States of one size as one state with their batch."""
    return None if states[0] is None else tree_map(lambda *ts: torch.cat(ts), *states)


def merged(ends: list[Any]) -> Any:
    return joined(ends) if len({sizes_of(end) for end in ends}) == 1 else ends


def sizes_of(state: Any) -> tuple:
    return tuple(tuple(t.shape) for t in tree_leaves(state))
