"""Token by token, as papers write a recurrence: what references of linear pages are run by, and nothing fast is.

    state = write(state, t)     for every key t that is there, in order, whatever a state is made of
    o_i   = read(state, i)      [B, H, E]; in causal_self at query i's own token, else after all keys

A hidden key writes nothing. `exact` gives float64, in which references compute; `rounded` gives back the dtypes that
the contract asks for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.trees import tree_map

Write = Callable[[Any, int], Any]
Read = Callable[[Any, int], Tensor]


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float64."""
    return tuple(t.double() for t in tensors)


def heads_of(t: Tensor, heads: int) -> Tensor:
    """[B, G, ...] -> [B, H, ...]: KV head h // (H / G) for every query head h."""
    return t[:, torch.arange(heads, device=t.device) // (heads // t.shape[1])]


def initial(call: Call, like: Tensor, *shape: int) -> Tensor:
    """The state that the call brings, a single tensor, in float64; zeros of this shape at the start of a text."""
    if call.initial_state is None:
        return torch.zeros(shape, dtype=torch.float64, device=like.device)
    return call.initial_state.double()


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero where b is zero: a query that sees nothing."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def recurrence(
    state: Any, write: Write, read: Read, queries: int, keys: int, call: Call, *, two_sided: bool = False
) -> tuple[Tensor, Any]:
    """(out [B, H, N, E], the last state), in float64.

    two_sided   in self, token i reads what both directions have written, its own once: for states that are sums and
                fade with distance. Without it every query reads the state after all keys
    """
    write = skipping_hidden(write, call.key_mask)
    if two_sided and call.pattern == "self":
        return both_directions(state, write, read, keys), None
    rows = []
    for t in range(keys):
        state = write(state, t)
        if call.pattern == "causal_self" and t >= keys - queries:
            rows.append(read(state, t - (keys - queries)))
    if call.pattern != "causal_self":
        rows = [read(state, i) for i in range(queries)]
    return torch.stack(rows, dim=2), state if call.pattern == "causal_self" else None


def skipping_hidden(write: Write, key_mask: Tensor | None) -> Write:
    if key_mask is None:
        return write

    def masked(state: Any, t: int) -> Any:
        def pick(new: Tensor, old: Tensor) -> Tensor:
            visible = key_mask[:, :, t]
            return torch.where(visible[(...,) + (None,) * (new.dim() - 2)], new, old)

        return tree_map(pick, write(state, t), state)

    return masked


def both_directions(zero: Any, write: Write, read: Read, n: int) -> Tensor:
    """Forward and backward states of a token added, less what it wrote itself, which is in both."""
    forward, backward, state = [], [], zero
    for t in range(n):
        state = write(state, t)
        forward.append(state)
    state = zero
    for t in reversed(range(n)):
        state = write(state, t)
        backward.append(state)
    rows = []
    for t, (ahead, behind) in enumerate(zip(forward, reversed(backward), strict=True)):
        both = tree_map(lambda a, b, itself: a + b - itself, ahead, behind, write(zero, t))
        rows.append(read(both, t))
    return torch.stack(rows, dim=2)


def rounded(out: Tensor, state: Any, like: Tensor) -> tuple[Tensor, Any]:
    """out in the dtype of `like`, sums of the state in float32 at least."""
    sums = torch.promote_types(like.dtype, torch.float32)
    return out.to(like.dtype), tree_map(lambda t: t.to(sums) if t.is_floating_point() else t, state)
