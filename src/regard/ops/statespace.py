"""A mixer of fixed state as a linear system that changes with time: what it was exported to, and its replay.

    h_i = Λ_i h_{i-1} + B_i u_i        h_{-1} = 0, u_i the values of token i, y_i its outputs
    y_i = C_i h_i + D_i u_i

Queries, keys and gates stand inside Λ, B, C and D; so does all of the state that values do not reach (a running
normaliser, a running maximum, the tail of a convolution): it has the same course whatever the values, and what divides
by it goes into C_i. Only what values reach is h. `of_features` writes the system of linear attention down from its
features; `export` finds the system of any mixer by asking its own decode step about every entry of h and of u, and
refuses a mixer that has none: one whose state grows, or that is not linear in its values.

Worked by hand: two tokens, features 1, decay 1/2, values 4 and 2: h = 4, then 4/2 + 2.

>>> one = torch.ones(1, 1, 2, 1)
>>> system = of_features(one, one, torch.full((1,), 0.5).log())
>>> system.replay(torch.tensor([[4.0], [2.0]])).flatten().tolist()
[4.0, 4.0]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core import Unsupported, require
from regard.core.trees import tree_leaves, tree_map


class System(NamedTuple):
    """Λ [N, n, n], B [N, n, p], C [N, m, n], D [N, m, p]: n numbers of state, p of input and m of output a token."""

    keep: Tensor
    write: Tensor
    read: Tensor
    skip: Tensor

    def replay(self, u: Tensor) -> Tensor:
        """y [N, m] of u [N, p]."""
        h, rows = self.keep.new_zeros(self.keep.shape[1]), []
        for keep, write, read, skip, u_i in zip(*self, u.to(self.keep.dtype), strict=True):
            h = keep @ h + write @ u_i
            rows.append(read @ h + skip @ u_i)
        return torch.stack(rows)


def of_features(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, normalise: bool = False, eps: float = 0.0
) -> System:
    """The system of one value channel of linear attention, head after head: h = (S_1, ..., S_H), y = (o_1, ..., o_H).

    q and k are features [1, H, N, D]; log_decay is None, [H], [1, H, N] or [1, H, N, D], as in ops.linear.
    """
    require(q.shape == k.shape and q.shape[0] == 1, "q and k are [1, H, N, D]", q=q.shape, k=k.shape)
    heads, n, width = q.shape[1:]
    g = torch.zeros(heads, dtype=k.dtype) if log_decay is None else log_decay.to(k.dtype)
    g = g[None, :, None].expand(1, -1, n) if g.dim() == 1 else g
    decay = (g[..., None] if g.dim() == 3 else g).expand(1, heads, n, width).exp()[0]  # [H, N, D]
    q, k = q[0], k[0]
    if normalise:
        z, sums = torch.zeros_like(k[:, 0]), []
        for i in range(n):
            z = decay[:, i] * z + k[:, i]
            sums.append(z)
        q = q / ((q * torch.stack(sums, dim=1)).sum(-1, keepdim=True) + eps)

    def by_head(t: Tensor) -> Tensor:
        """[N, H·D, H], head h in the rows of head h."""
        return torch.einsum("hnd,hg->nhdg", t, torch.eye(heads, dtype=t.dtype)).flatten(1, 2)

    keep = torch.diag_embed(decay.transpose(0, 1).flatten(1))
    return System(keep, by_head(k), by_head(q).mT, k.new_zeros(n, heads, heads))


Step = Callable[[int, Tensor, Any], tuple[Tensor, Any]]


def export(step: Step, steps: int, values: tuple[int, ...], tolerance: float = 1e-9) -> System:
    """The system of a mixer whose decode step is step(i, v [P, *values], state of P rows or None) -> (out, state).

    Steps are in float64. Unsupported where there is no such system, with the reason.
    """
    g = torch.Generator().manual_seed(0)
    u = torch.randn(steps, 1, *values, dtype=torch.float64, generator=g)
    still, moving = course(step, torch.zeros_like(u)), course(step, u)
    sizes = [flat(state).shape[1] for _, state in still]
    if len(set(sizes)) > 1:
        raise Unsupported(
            f"its state grows with the text, {sizes[0]} to {sizes[-1]} numbers: no finite replay"
        )
    if any(out.abs().max() > tolerance for out, _ in still):
        raise Unsupported("values of zero do not give zero: it is not linear in its values")
    reached = torch.cat([flat(b) != flat(a) for (_, a), (_, b) in zip(still, moving, strict=True)])
    h = reached.any(0).nonzero()[:, 0]  # the places of the state that values reach
    parts = [probed(step, i, still[i - 1][1] if i else None, h, u[i, 0]) for i in range(steps)]
    system = System(*(torch.stack(t) for t in zip(*parts, strict=True)))
    replayed, wanted = system.replay(u.flatten(1)), torch.cat([out.flatten(1) for out, _ in moving])
    if not torch.allclose(replayed, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item()):
        raise Unsupported("not linear: the outputs for random values are not those that the system gives")
    return system


def course(step: Step, u: Tensor) -> list[tuple[Tensor, Any]]:
    """(out, state) after each token."""
    state, result = None, []
    for i, u_i in enumerate(u):
        out, state = step(i, u_i, state)
        result.append((out, state))
    return result


def probed(step: Step, i: int, state: Any, h: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Λ, B, C, D) of token i: one row asks what it gives as it is, and one each for an entry of h or u moved by 1."""
    n, p = (0 if state is None else len(h)), like.numel()
    values = torch.cat([like.new_zeros(1 + n, p), torch.eye(p, dtype=like.dtype)])
    before = None if state is None else moved(state, h, len(values))
    out, after = step(i, values.view(-1, *like.shape), before)
    y, s = ((t - t[:1])[1:].mT for t in (out.flatten(1), flat(after)[:, h]))  # [m, n + p], [len(h), n + p]
    keep, write = s[:, :n], s[:, n:]
    if state is None:  # there is nothing to keep or to read yet
        return write.new_zeros(len(h), len(h)), write, y.new_zeros(len(y), len(h)), y
    read = y[:, :n] @ inverse(keep)  # what token i reads of h_{i-1} is C_i Λ_i
    return keep, write, read, y[:, n:] - read @ write


def inverse(keep: Tensor) -> Tensor:
    """The pseudo-inverse: what is forgotten altogether cannot be read. Most decays are diagonal, and states wide."""
    diagonal = keep.diagonal()
    if torch.equal(keep, torch.diag(diagonal)):
        return torch.diag(torch.where(diagonal == 0, 0, 1 / diagonal))
    return torch.linalg.pinv(keep)


def reals(state: Any) -> list[Tensor]:
    """The tensors of real numbers in a state, each with its rows first."""
    return [leaf for leaf in tree_leaves(state) if leaf.is_floating_point()]


def flat(state: Any) -> Tensor:
    """[P, numbers of the state]."""
    parts = [leaf.flatten(1) for leaf in reals(state)]
    return torch.cat(parts, dim=1) if parts else torch.zeros(1, 0, dtype=torch.float64)


def moved(state: Any, h: Tensor, rows: int) -> Any:
    """`rows` copies of a state of one row; row 1 + j has entry h_j moved by 1."""
    every = flat(state).repeat(rows, 1)
    every[1 + torch.arange(len(h)), h] += 1
    start = 0

    def cut(part: Tensor) -> Tensor:
        nonlocal start
        if not part.is_floating_point():
            return part.expand(rows, *part.shape[1:]) if part.dim() else part
        entries = every[:, start : start + part.numel()]
        start += part.numel()
        return entries.reshape(rows, *part.shape[1:]).to(part.dtype)

    return tree_map(cut, state)
