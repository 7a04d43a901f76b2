"""The fast path of a page that treats each text by itself: padding is taken out, texts of one length go together."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from regard.core import Unsupported
from regard.core.call import Call
from regard.ops.blocks.placed import BY_HEAD, Placed, placed
from regard.ops.pattern import visible
from regard.ops.softmax import softmax_attention

# q [b, H, n, D], k and v [b, G, m, ...] of texts of one length -> out [b, H, n, E]
Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


def each_text(answer: Answer, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """[B, H, N, E] what `answer` says of the real tokens of each row; in self a hidden token asks nothing either."""
    at = placed(q, k, v, replace(call, pattern="causal_self") if call.pattern == "self" else call, 1)
    if call.key_mask is None:
        return at.back(answer(at.q, at.k, at.v)).to(v.dtype)
    out = v.new_zeros(*at.q.shape[:3], v.shape[3])
    for rows, queries, keys in lengths(at):
        some = answer(at.q[rows, :, :queries], at.k[rows, :, :keys], at.v[rows, :, :keys])
        out[rows, :, :queries] = some.to(v.dtype)
    return at.back(out)


def lengths(at: Placed) -> Iterator[tuple[list[int], int, int]]:
    """(rows of the batch, queries, keys) of texts that are alike, where there are any of both."""
    keys = at.length.tolist()
    starts = at.start.tolist() if at.causal else [m - at.queries for m in keys]
    sizes = [(m - start, m) for start, m in zip(starts, keys, strict=True)]
    for queries, m in sorted(set(sizes)):
        if queries > 0 and m > 0:
            yield [b for b, size in enumerate(sizes) if size == (queries, m)], queries, m


def plain_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """[B, H, N, E] softmax attention to all that is seen, with hidden tokens that ask nothing, as each_text has it."""
    if call.key_mask is not None and call.key_mask.shape[1] != 1:
        raise Unsupported(BY_HEAD)
    n, m, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    if call.pattern == "causal_self" and call.key_mask is None and n == m:
        return softmax_attention(q, k, v, scale=scale, causal=True)
    out = softmax_attention(q, k, v, scale=scale, mask=visible(call, n, m, q.device))
    if call.key_mask is None or call.pattern == "cross":
        return out
    return out.masked_fill(~call.key_mask[:, :, m - n :, None], 0)
