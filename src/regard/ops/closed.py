"""Texts in blocks of tokens: hidden tokens left out, so that a block is a count of real ones; blocks, their choice.

What stands at place p of a row is its p-th token that is there, whatever padding lies before, between or after.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.core.call import Call
from regard.ops.linear import shown
from regard.ops.pattern import carried
from regard.ops.softmax import lower_right, per_query_head, softmax_attention
from regard.ops.topk import gather_rows
from regard.ops.transforms import transformed

ROWS = 256  # queries at a time: changes the speed, never the result
KEPT = 1 << 24  # weights that a backward pass may keep; more are computed again


class Closed(NamedTuple):
    """A text closed up over its hidden tokens, by row and head: b and h are 1 where all are alike.

    first   the place of the first query: a number where all rows agree, else [b, h, 1, 1]
    count   how many tokens are there: a number, or [b, h, 1, 1]
    order   [b, h, M] the token at each place, hidden ones last; None: nothing is hidden, and a place is an index
    asking  [b, h, N] the query that is the n-th of those there
    back    [b, h, N] which of those there each query is, -1 for a hidden one
    """

    first: int | Tensor
    count: int | Tensor
    order: Tensor | None = None
    asking: Tensor | None = None
    back: Tensor | None = None

    def keys(self, t: Tensor) -> Tensor:
        """[B, G|H, M, D] in the order of places."""
        return t if self.order is None else gather_rows(t, self.order)

    def queries(self, t: Tensor) -> Tensor:
        return t if self.asking is None else gather_rows(t, self.asking)

    def places(self, rows: slice, like: Tensor) -> Tensor:
        """[n, 1], or [b, h, n, 1] where rows differ: the places of these of the queries."""
        return self.first + torch.arange(rows.start, rows.stop, device=like.device)[:, None]

    def opened(self, out: Tensor) -> Tensor:
        """Outputs where their queries stood, zeros for hidden ones."""
        if self.back is None:
            return out
        return gather_rows(out, self.back).masked_fill((self.back < 0)[..., None], 0)


def closed(call: Call, queries: int, keys: int) -> Closed:
    """The text of a call whose `keys` keys end with those of its queries."""
    mask = call.key_mask
    if mask is None:
        return Closed(keys - queries, keys)
    before, own = mask[..., : keys - queries], mask[..., keys - queries :]
    first = before.sum(-1)[..., None, None] if keys > queries else 0
    order, asking = (t.to(torch.uint8).argsort(dim=-1, descending=True, stable=True) for t in (mask, own))
    back = (own.cumsum(-1) - 1).masked_fill(~own, -1)
    return Closed(first, mask.sum(-1)[..., None, None], order, asking, back)


def carried_with_queries(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Any]:
    """As `carried`, for pages that read the queries of earlier tokens: all of them too, the last of the state."""
    before = call.initial_state
    k, v, state = carried(k, v, call if before is None else call.with_(initial_state=before[:2]))
    q = q if before is None else torch.cat([before[2], q], dim=2)
    return shown(q, call.key_mask), k, v, None if state is None else (*state, q)


def highest(score: Tensor, count: int, limit: Tensor | None = None) -> Tensor:
    """Ascending indices [..., m] of the `count` highest of score [..., n]; ties go to the lower index.

    -inf is never taken: where fewer remain, or `limit` [..., 1] >= 1 is smaller, -1 fills up the end.

    >>> highest(torch.tensor([[3.0, 5.0, 3.0, 3.0], [-torch.inf, -torch.inf, 0.0, -torch.inf]]), 2)
    tensor([[ 0,  1],
            [ 2, -1]])
    """
    score, n = score.detach(), score.shape[-1]
    count = min(count, n)
    top = score.topk(count, dim=-1).values
    most: Any = count
    bar = top[..., -1:]
    if limit is not None:
        most = limit.clamp(max=count)
        bar = top.gather(-1, (most - 1).expand(*top.shape[:-1], 1))
    above, level = score > bar, score == bar
    room = most - above.sum(-1, keepdim=True)
    taken = (above | (level & (level.cumsum(-1) <= room))) & (score > -torch.inf)
    left = torch.arange(n, 0, -1, device=score.device)  # falls as the index rises
    index = n - torch.where(taken, left, 0).topk(count, dim=-1).values
    return index.masked_fill(index == n, -1)


def chunks(rows: int, step: int) -> Iterator[slice]:
    """Slices of so many rows, of one at least.

    >>> [*chunks(3, 2)], [*chunks(2, 0)]
    ([slice(0, 2, None), slice(2, 3, None)], [slice(0, 1, None), slice(1, 2, None)])
    """
    step = max(1, step)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def recomputed(numbers: int, function: Callable, *inputs: Any) -> Any:
    """function(*inputs); of more than KEPT numbers in all, a backward pass computes it again and keeps none."""
    learns = torch.is_grad_enabled() and not transformed(*(t for t in inputs if isinstance(t, Tensor)))
    if learns and numbers > KEPT:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


def near_and_summed(
    q: Tensor, k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor], text: Closed, span: Callable, sees: Callable
) -> Tensor:
    """One softmax of each query over the tokens near it and over summaries of those far away: [B, H, N, E].

    k, v   [B, G, M, ...] in the order of places         sums  keys and values of J summaries, [B, H|1, J, ...]
    span   span(a, b) -> (start, stop, j): queries at places a to b - 1 see tokens from start to stop - 1 and of the
           first j summaries alone
    sees   sees(place [.., n, 1], tokens [t], summaries [j]) -> bool [.., n, t] and [.., n, j]
    """
    heads, scale, outs = q.shape[1], q.shape[3] ** -0.5, []
    far_k, far_v = (s.to(k.dtype).expand(-1, heads, -1, -1) for s in sums)
    for rows in chunks(q.shape[2], ROWS):
        start, stop, j = 0, k.shape[2], far_k.shape[2]
        if isinstance(text.first, int):
            start, stop, j = span(text.first + rows.start, text.first + rows.stop)
        near, far = (torch.arange(*ends, device=q.device) for ends in ((start, stop), (0, j)))
        mask = torch.cat(sees(text.places(rows, q), near, far), dim=-1)
        k_r, v_r = (per_query_head(t[:, :, start:stop], heads).expand(-1, heads, -1, -1) for t in (k, v))
        k_r, v_r = torch.cat([k_r, far_k[:, :, :j]], dim=2), torch.cat([v_r, far_v[:, :, :j]], dim=2)
        outs.append(softmax_attention(q[:, :, rows], k_r, v_r, scale=scale, mask=mask))
    return torch.cat(outs, dim=2)


def among_members(
    q: Tensor, k: Tensor, v: Tensor, asking: Tensor, answering: Tensor, *, scale: float, causal: bool
) -> Tensor:
    """Softmax attention within sets of tokens, averaged where a token asks in several, zero in none: [B, H, N, E].

    asking, answering   [B, H, S, w] the queries and the keys of each set, ascending, -1 where there are fewer; one
                        and the same where `causal` hides the later ones. q, k and v have H heads, in float32 at least
    """
    (batch, heads, n, _), (sets, w) = q.shape, asking.shape[2:]

    def gathered(t: Tensor, index: Tensor) -> Tensor:
        return gather_rows(t, index.flatten(2)).view(batch * heads, sets, w, -1)

    mask = (answering >= 0).flatten(0, 1)[:, :, None]
    mask = mask & lower_right(w, w, q.device) if causal else mask
    parts = gathered(q, asking), gathered(k, answering), gathered(v, answering)
    # a column of ones counts the sets of a token; row n of each head takes what no token asked for
    found = F.pad(softmax_attention(*parts, scale=scale, mask=mask), (0, 1), value=1.0)
    row = torch.where(asking < 0, n, asking).flatten(0, 1).flatten(1)
    row = row + (n + 1) * torch.arange(batch * heads, device=q.device)[:, None]
    total = found.new_zeros(batch * heads * (n + 1), found.shape[-1])
    total = total.index_add(0, row.flatten(), found.flatten(0, 2)).view(batch, heads, n + 1, -1)[:, :, :n]
    return total[..., :-1] / total[..., -1:].clamp(min=1)
