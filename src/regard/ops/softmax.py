"""Softmax attention in one place: explicit weights in blocks of rows, SDPA where it serves, partial results merged.

Shapes: q [B, H, N, D]; k [B, G, M, D]; v [B, G, M, E]; H a multiple of G, query head h reads KV head h // (H/G).
A mask is boolean, True = attend, broadcastable to [B, H, N, M]. Scores, sums and the softmax are float32 at least.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.machine import LOW, product_dtype
from regard.ops.precision import as_written
from regard.ops.transforms import asks_values

LONG = 4096  # stored tokens from which on a head is worth a product of its own; changes the speed only
BLOCK = 1 << 20  # numbers in one block of scores: bounds the memory, never changes the result
PIECE = 1 << 20  # stored numbers that are widened at a time: changes the speed only


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, G, ...] -> [B, H, ...]: every query head beside the KV head that it reads. No copy where G is H or 1."""
    if x.shape[1] in (1, heads):
        return x
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@as_written
def times(a: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """a @ x, or a @ xᵀ, for stored keys or values x [B, G, n, D] that may be a part of a longer buffer.

    a is [B, G, r, ...]. Batched products in low precision on a CPU are 12 times slower when the batch is not dense
    (docs/log.md): a short x is copied, a long one is taken head by head. Where the CPU does not multiply x's dtype, the
    products and what comes out are in float32.
    """
    if product_dtype(x) != x.dtype:
        return widened(a, x, transposed)
    slow = x.device.type == "cpu" and x.dtype in LOW and not x.is_contiguous() and a.shape[:2] == x.shape[:2]
    if slow and x.shape[2] >= LONG:
        heads = [
            rows @ (part.mT if transposed else part) for rows, part in zip(a.flatten(0, 1), x.flatten(0, 1))
        ]
        return torch.stack(heads).unflatten(0, a.shape[:2])
    x = x.contiguous() if slow else x
    return a @ (x.mT if transposed else x)


def widened(a: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """a @ x, or a @ xᵀ, in float32; a piece of a long x at a time, so that no wide copy of it leaves the cache."""
    a, tokens = a.float(), x.shape[2]
    step = max(1, PIECE // max(1, x.shape[0] * x.shape[1] * x.shape[3]))
    if tokens <= step or torch.is_grad_enabled() or torch.compiler.is_compiling():
        x = x.float()
        return a @ (x.mT if transposed else x)
    # one buffer for all: memory that is new for every piece costs more than what is done in it
    wide, parts = a.new_empty(*x.shape[:2], step, x.shape[3]), list[Tensor]()
    for cut in (slice(i, i + step) for i in range(0, tokens, step)):
        piece = x[:, :, cut]
        piece = wide[:, :, : piece.shape[2]].copy_(piece)
        parts.append(a @ piece.mT if transposed else a[..., cut] @ piece)
    return torch.cat(parts, dim=-1) if transposed else torch.stack(parts).sum(0)


def scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """[B, H, N, M] scaled scores in float32 at least: the product in the input's dtype, the rest above it.

    A power of two of the scale stands before the product, so that it does not leave float16, and rounds nothing. At
    widths of 16, 64 or 256 that is all of the scale, and the scores need no pass of their own.
    """
    groups, rows = k.shape[1], q.shape[2]
    before = power_of_two(scale)
    q = q if before == 1 else q * before
    scale = scale / before
    if groups in (1, q.shape[1]):
        result = times(q, k, transposed=True)
    else:
        packed = q.reshape(q.shape[0], groups, -1, q.shape[-1])  # [B, G, (H/G)·N, D]
        result = times(packed, k, transposed=True).view(q.shape[0], q.shape[1], rows, -1)
    result = at_least_float32(result)
    if scale != 1:
        result = result.mul_(scale) if writable(result) else result * scale
    result = capped(result, softcap)
    return result if bias is None else result + bias


def writable(x: Tensor) -> bool:
    """Whether numbers that are nobody else's may be overwritten: no gradient and no transform looks back at them."""
    return asks_values() and not x.requires_grad


def power_of_two(scale: float) -> float:
    """The largest power of two that is no larger than |scale|, and 1 at most.

    >>> power_of_two(128**-0.5), power_of_two(30.0)
    (0.0625, 1.0)
    """
    return 2.0 ** min(math.floor(math.log2(abs(scale))), 0) if scale else 1.0


def capped(s: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(s / softcap); s itself without a softcap."""
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def hide(s: Tensor, mask: Tensor) -> Tensor:
    """Scores s, overwritten by -inf where the mask hides: from the first column on that it hides from any row.

    A causal block of rows sees all but its last columns whole, so most of s is not touched.
    """
    hidden, first = ~mask, 0
    if s.device.type == "cpu" and mask.shape[-1] == s.shape[-1] > 1:
        somewhere = hidden.reshape(-1, s.shape[-1]).any(0)
        first = int(somewhere.to(torch.uint8).argmax()) if bool(somewhere.any()) else s.shape[-1]
    s[..., first:].masked_fill_(hidden[..., first:], -torch.inf)
    return s


def masked_softmax(
    s: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, owned: bool = False
) -> Tensor:
    """Weights [B, H, N, M] of scores s. Rows that see nothing, by the mask or by scores of -inf, are zero.

    `sinks` [H] join the sum, not the output. `owned`: nobody else reads s, which may be overwritten.
    """
    if mask is not None:
        s = hide(s, mask) if owned and writable(s) else s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = at_least_float32(sinks).view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
        return torch.cat([s, column.to(s.dtype)], dim=-1).softmax(-1)[..., :-1]
    weights = s.softmax(-1)
    # a row that sees nothing is NaN from end to end
    if asks_values() and not bool(weights[..., :1].isnan().any()):
        return weights
    dead = (s == -torch.inf).all(-1, keepdim=True)
    # a dead row has finite gradients too
    return torch.where(dead, 0, s).softmax(-1).masked_fill(dead, 0)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, E] = weights [B, H, N, M] times the values of each head's KV head, in the values' dtype."""
    weights = weights.to(product_dtype(v))
    heads, groups = weights.shape[1], v.shape[1]
    if groups in (1, heads):
        return times(weights, v).to(v.dtype)
    packed = weights.reshape(weights.shape[0], groups, -1, weights.shape[-1])
    return times(packed, v).view(*weights.shape[:3], v.shape[-1]).to(v.dtype)


def row_blocks(rows: int, per_row: int) -> Iterator[slice]:
    """Slices of rows such that a block of scores stays under BLOCK numbers."""
    step = max(1, BLOCK // max(1, per_row))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention through explicit weights, a block of rows at a time: [B, H, N, E]. Does whatever SDPA cannot."""
    parts = []
    for rows in row_blocks(q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]):
        cut = None if bias is None else bias[..., rows, :] if bias.shape[-2] > 1 else bias
        seen = None if mask is None else mask[..., rows, :] if mask.shape[-2] > 1 else mask
        parts.append(mix(masked_softmax(scores(q[:, :, rows], k, scale, softcap, cut), seen, sinks, True), v))
    return torch.cat(parts, dim=2) if len(parts) != 1 else parts[0]


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """torch's SDPA with grouped heads. `causal` is meant for N = M; other shapes come with a mask."""
    blind = None
    if mask is not None:
        # SDPA has no meaning for a row that sees nothing
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    if mask is not None or k.shape[1] == 1:
        k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
    grouped = k.shape[1] not in (1, q.shape[1])
    if k.shape[1] == 1:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal, enable_gqa=grouped)
    return out if blind is None else out.masked_fill(blind, 0)


def few_rows(q: Tensor, k: Tensor) -> bool:
    """Whether two matrix products beat SDPA: a handful of queries on a CPU in low precision (docs/log.md)."""
    return q.device.type == "cpu" and q.dtype in LOW and q.shape[2] <= 8


def one_pass(q: Tensor) -> bool:
    """Whether weights that are summed anyway give the attention too: where fused attention is no faster than the
    product that this adds, and the weights are not rounded.
    """
    return q.device.type == "cpu" and q.shape[2] > 1 and q.dtype not in LOW and not torch.is_grad_enabled()


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention by the fastest path that can compute it: [B, H, N, E]."""
    plain = softcap is None and bias is None and sinks is None
    if plain and (torch.is_grad_enabled() or not few_rows(q, k) or causal):
        return fused(q, k, v, scale=scale, mask=mask, causal=causal)
    if causal:
        mask = lower_right(q.shape[2], k.shape[2], q.device)
    return explicit(q, k, v, scale=scale, mask=mask, softcap=softcap, bias=bias, sinks=sinks)


def lower_right(n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, m] causal mask whose last query sees all m keys."""
    q = torch.arange(n, device=device)[:, None] + (m - n)
    return torch.arange(m, device=device) <= q


def partial(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What one worker returns for its span of keys: (o, m, l), o unnormalised.

    o [B, H, N, E] = Σ_j e^{s_j - m} v_j, m [B, H, N] = max_j s_j, l [B, H, N] = Σ_j e^{s_j - m}.
    An empty span gives o = 0, m = -inf, l = 0.
    """
    s = scores(q, k, scale)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if s.shape[-1] == 0:
        zero = s.new_zeros(s.shape[:3])
        return s.new_zeros(*s.shape[:3], v.shape[-1]), zero - torch.inf, zero
    top = s.amax(-1)
    e = (s - top.nan_to_num(neginf=0.0)[..., None]).exp()
    return at_least_float32(mix(e, at_least_float32(v).to(e.dtype))), top, e.sum(-1)


def merge(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The partial result of two spans together; associative, commutative, (0, -inf, 0) is neutral.

    m = max(m_a, m_b), o = o_a e^{m_a - m} + o_b e^{m_b - m}, l likewise (Lean Attention, 2024; FlashAttention).
    """
    m = torch.maximum(a[1], b[1])
    base = m.nan_to_num(neginf=0.0)
    wa, wb = (a[1] - base).exp(), (b[1] - base).exp()
    return a[0] * wa[..., None] + b[0] * wb[..., None], m, a[2] * wa + b[2] * wb


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out [B, H, N, E] of a sum whose logarithm is lse [B, H, N], when learned sinks [H] join that sum."""
    share = (lse - at_least_float32(sinks).view(1, -1, 1)).sigmoid()
    return (out * share[..., None].to(out.dtype)).nan_to_num(0.0)


def finish(o: Tensor, m: Tensor, l: Tensor) -> Tensor:  # noqa: E741  (the papers' letter)
    """o / l, and zero for rows that saw no key."""
    return torch.where(l[..., None] > 0, o / l[..., None].clamp(min=torch.finfo(l.dtype).tiny), 0)
