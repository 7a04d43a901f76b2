"""Texts of unequal length packed into one row: cu_seqlens [S + 1] are the places where they begin, and the end.

Texts of one length run together as a batch, so nothing is padded, no text sees another, and every mechanism can; those
of a mechanism that mixes the rows of a batch run apart. A text may be empty: it gives no output, and its state is the
one that it came with, None where it came with none.
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
    require(cuts.dim() == 1 and len(cuts) >= 2 and not cuts.is_floating_point() and cuts.dtype != torch.bool,
            f"{name} holds the S + 1 borders of S texts", **{name: cuts})  # fmt: skip
    cuts = cuts.tolist()
    require(cuts[0] == 0 and cuts[-1] == tokens, f"{name} begins at 0 and ends at the number of tokens",
            first=cuts[0], last=cuts[-1], tokens=tokens)  # fmt: skip
    lengths = [b - a for a, b in pairwise(cuts)]
    require(min(lengths) >= 0, f"{name} never falls", lengths=lengths)
    return lengths


def both_borders(
    pattern: str, cu_seqlens: Any, cu_seqlens_k: Any, queries: int, keys: int
) -> tuple[list[int], list[int]]:
    """The lengths of the texts of the queries, and of those of the keys: the same ones, or memories in cross."""
    cross = "cross" in pattern
    require(cu_seqlens is not None, "cu_seqlens are the borders of the queries' texts", cu_seqlens=cu_seqlens)
    require(cross == (cu_seqlens_k is not None), "cu_seqlens_k are the borders of the keys' texts in cross patterns",
            pattern=pattern, cu_seqlens_k=cu_seqlens_k)  # fmt: skip
    lengths = borders(cu_seqlens, queries, "cu_seqlens")
    name, cuts = ("cu_seqlens_k", cu_seqlens_k) if cross else ("cu_seqlens", cu_seqlens)
    memories = borders(cuts, keys, name)
    require(len(lengths) == len(memories), "there are as many memories as texts", texts=len(lengths),
            memories=len(memories))  # fmt: skip
    return lengths, memories


def run_packed(
    run: Callable, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], memories: list[int], *,
    initial_state: Any = None, x: Any = None, apart: bool = False,
) -> tuple[Tensor, Any]:  # fmt: skip
    """(out [1, H, T, E], states) of run(q, k, v, initial_state=..., x=...) -> (out, state) on every text by itself.

    q [1, H, T, D] and k, v [1, G, T', ...] hold the texts end to end. States come, and are given back, as one state
    with a batch of S texts where all have one size, or as a list of S states, one of which may be None.
    """
    require(q.shape[0] == k.shape[0] == 1, "packed texts are one row: q [1, H, T, D]", q=q, k=k)
    inputs = [None] * len(lengths) if x is None else split_inputs(x, lengths, memories)
    texts = list(zip(q.split(lengths, 2), k.split(memories, 2), v.split(memories, 2), inputs, strict=True))

    def one(text: tuple, state: Any) -> tuple[Tensor, Any]:
        return run(*text[:3], initial_state=state, x=text[3])

    return run_texts(one, texts, initial_state, axis=2, apart=apart)


def run_texts(
    run: Callable, texts: list[Any], initial_state: Any = None, *, axis: int, apart: bool = False
) -> tuple[Any, Any]:
    """(out, states) of run(text, state) -> (out, state): a text is a tree of tensors with a batch of one, out a tree
    of tensors whose tokens lie along `axis`. Texts of one size run together, unless they are to run `apart`."""
    before = states_of(initial_state, len(texts))
    outs: list[Any] = [None] * len(texts)
    ends: list[Any] = [None] * len(texts)
    together: dict[Any, list[int]] = {}
    for i, text in enumerate(texts):
        size = i if apart else (sizes_of(text), sizes_of(before[i]))
        together.setdefault(size, []).append(i)
    for members in together.values():
        out, end = run(joined([texts[i] for i in members]), joined([before[i] for i in members]))
        for row, i in enumerate(members):
            outs[i], ends[i] = picked(out, row), picked(end, row)
    return tree_map(lambda *parts: torch.cat(parts, dim=axis), *outs), merged(ends)


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
