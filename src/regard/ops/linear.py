"""Linear attention with and without decay, in one place: the dense definition, and the chunked form of equal numbers.

    S_t = e^{g_t} S_{t-1} + k_tᵀ v_t        a [D, E] state per head
    o_t = q_t S_t                            with normalise: o_t = q_t S_t / (q_t z_t + eps), z the same sum of k alone

q [B, H, N, D], k [B, G, M, D] and v [B, G, M, E] are features, so whatever map is applied to queries and keys stands
before. log_decay g is None (no decay), [H] (one fixed number per head), [B, H, M] (per token) or [B, H, M, D] (per
token and key channel); it is <= 0, and what lies below -60 (a factor of 1e-26) counts as -60.

causal_self    query i reads S_i; the last query is that of the last key; a state carries on
self           both directions: token s weighs by the decays between s and t, its own once; without decay, all keys
cross          every query reads the state that the whole memory has left; causal_cross: the same, as queries do not
               speak to each other

A hidden key is as if it were not there: it adds nothing and does not decay. Masks are of keys; a mask of pairs is
refused, as a sum that all queries share cannot leave one out. States are float32 at least, [B, H, D, E], or
[B, H, D, E + 1] with normalise, whose last column is z.
"""

from typing import Any

import torch
from torch import Tensor

from regard.core import Unsupported, require
from regard.core.mask import Mask
from regard.core.shapes import PATTERNS
from regard.ops.backend import causal, on_triton
from regard.ops.chunk import LOWEST
from regard.ops.pattern import dense_mask
from regard.ops.softmax import at_least_float32, lower_right, per_query_head

CHUNK = 64


def key_mask(mask: Mask | Tensor | None, q: Tensor, k: Tensor, roles: Any = None) -> Tensor | None:
    """[B|1, H|1, M] bool, True = there. Unsupported for a mask under which queries see different keys."""
    found = dense_mask(mask, q, k, roles)
    if found is None:
        return None
    while found.dim() < 4:
        found = found[None]
    if found.shape[2] > 1 and not bool((found == found[:, :, :1]).all()):
        raise Unsupported(
            "a mask of pairs: linear attention sums the keys for all queries at once; mask keys instead"
        )
    return found[:, :, 0].expand(-1, -1, k.shape[2])


def shown(t: Tensor, there: Tensor | None) -> Tensor:
    """Keys, values or features [B, G|H, M, ...] with zeros where key_mask says that nothing is."""
    if there is None:
        return t
    return t.masked_fill(
        ~there[..., None] if there.shape[1] in (1, t.shape[1]) else ~there[:, :1, :, None], 0
    )


def inputs_of_keys(x: Any, pattern: str) -> Tensor:
    """The layer's input at the keys: x, or in cross patterns the second of x = (of the queries, of the keys)."""
    if "cross" not in pattern:
        return x
    require(isinstance(x, tuple) and len(x) == 2, "in cross, x is (inputs of queries, inputs of keys)", x=x)
    return x[1]


def prepared(q, k, v, log_decay, pattern, mask, state, roles, normalise):
    """(q, k, v per query head with hidden keys zeroed, decay or None, state): what both forms below start from."""
    require(pattern in PATTERNS, f"pattern is one of {PATTERNS}", pattern=pattern)
    require(state is None or pattern == "causal_self", "only causal_self carries a state", pattern=pattern)
    there = key_mask(mask, q, k, roles)
    k, v = (per_query_head(t, q.shape[1]).expand(-1, q.shape[1], -1, -1) for t in (k, v))
    k, v = shown(k, there), shown(v, there)
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if log_decay is not None:
        g = at_least_float32(log_decay)
        if there is not None:
            g = g[:, None].expand(-1, k.shape[2])[None] if g.dim() == 1 else g
            g = g.masked_fill(~(there if g.dim() == 3 else there[..., None]), 0)
        log_decay = g
    return q, k, v, log_decay, state


def finished(out: Tensor, normalise: bool, eps: float, dtype: torch.dtype) -> Tensor:
    if normalise:
        total = out[..., -1:] + eps
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
    return out.to(dtype)


def dense_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, pattern: str = "causal_self",
    mask: Any = None, state: Tensor | None = None, roles: Any = None, normalise: bool = False, eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition through all N x M weights: (out [B, H, N, E], state). Quadratic, exact, on any device."""
    dtype = v.dtype
    q, k, v, g, state = prepared(q, k, v, log_decay, pattern, mask, state, roles, normalise)
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    g = k.new_zeros(1, 1, 1) if g is None else g.to(k.dtype).clamp(min=LOWEST)
    g = g[None, :, None] if g.dim() == 1 else g
    g = (g[..., None] if g.dim() == 3 else g).expand(*k.shape)  # [B, H, M, D]
    total = g.cumsum(2)  # the decay up to and with a token
    n, m = q.shape[2], k.shape[2]
    s, t = torch.arange(m, device=q.device), torch.arange(m - n, m, device=q.device)[:, None]
    if "cross" in pattern:
        between = (total[:, :, -1:, None] - total[:, :, None]).expand(-1, -1, n, -1, -1)
    else:
        past = (s <= t)[..., None]
        between = (total[:, :, m - n :, None] - total[:, :, None]).masked_fill(~past, -torch.inf)
        if pattern == "self":
            before = total - g
            ahead = (before[:, :, None] - before[:, :, :, None]).masked_fill(past, -torch.inf)
            between = torch.where(past, between, ahead)
    weights = torch.einsum("bhnd,bhnmd,bhmd->bhnm", q, between.exp(), k)
    out = weights @ v
    if pattern != "causal_self":
        return finished(out, normalise, eps, dtype), None
    end = (k * (total[:, :, -1:] - total).exp()).mT @ v  # [B, H, D, E]
    if state is not None:
        out = out + (q * total[:, :, m - n :].exp()) @ state.to(q.dtype)
        end = end + total[:, :, -1].exp()[..., None] * state.to(q.dtype)
    return finished(out, normalise, eps, dtype), end


def undecayed(q: Tensor, k: Tensor, v: Tensor, *, pattern: str, mask: Tensor | None) -> Tensor:
    """(Q Kᵀ) V over the keys that a query may see, what linear attention is without feature map, decay and
    denominator: the base of pages that add to it."""
    weights = at_least_float32(q) @ at_least_float32(per_query_head(k, q.shape[1])).mT
    if pattern == "causal_self":
        lower = lower_right(q.shape[2], k.shape[2], q.device)
        mask = lower if mask is None else mask & lower
    weights = weights if mask is None else weights.masked_fill(~mask, 0)
    return (weights @ at_least_float32(per_query_head(v, q.shape[1]))).to(v.dtype)


def linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, pattern: str = "causal_self",
    mask: Any = None, state: Tensor | None = None, roles: Any = None, normalise: bool = False, eps: float = 1e-6,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As dense_linear, in time and memory that grow with N + M: (out [B, H, N, E], state).

    Products are taken in the input's dtype; sums, decays and states in float32 at least. `chunk` changes the speed,
    never the result.
    """
    n, dtype = q.shape[2], v.dtype
    q, k, v, g, state = prepared(q, k, v, log_decay, pattern, mask, state, roles, False)
    if pattern == "causal_self":
        earlier = k.shape[2] - n
        if earlier:  # keys before the first query
            before = cut(g, slice(earlier))
            state = memory(k[:, :, :earlier], v[:, :, :earlier], before, state, normalise)
            k, v, g = k[:, :, earlier:], v[:, :, earlier:], cut(g, slice(earlier, None))
        if n == 1:
            return step(q, k, v, g, state, normalise, eps)
        return causal(q, k, v, bounded(g, q), state, chunk=chunk, normalise=normalise, eps=eps)
    if pattern == "self" and g is not None:
        return both_ways(q, k, v, g, normalise, eps, chunk), None
    state = memory(k, v, g, None, normalise)
    return read(q, state, normalise, eps, dtype), None


def bounded(g: Tensor | None, q: Tensor) -> Tensor | None:
    """Torch's tiles do it themselves, in cache; a kernel takes gates as they are."""
    return g.clamp(min=LOWEST) if g is not None and on_triton(q) else g


def cut(g: Tensor | None, tokens: slice) -> Tensor | None:
    return g if g is None or g.dim() == 1 else g[:, :, tokens]


def read(q: Tensor, state: Tensor, normalise: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """What queries find in a state; the product in their dtype."""
    state = state.to(q.dtype) if q.dtype == torch.bfloat16 else state
    if not normalise:
        return in_dtype(q, state).to(dtype)
    total = at_least_float32(in_dtype(q, state[..., -1:])) + eps
    return (in_dtype(q, state[..., :-1]) / total.masked_fill(total == 0, 1)).to(dtype)


def in_dtype(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in bfloat16 if both are, else in float32 at least."""
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        a, b = at_least_float32(a), at_least_float32(b)
    return dense(a) @ dense(b)


def dense(t: Tensor) -> Tensor:
    """A copy where a batched product in low precision on a CPU would be slow: 12 times (docs/log.md)."""
    slow = t.dtype == torch.bfloat16 and t.device.type == "cpu"
    return t if not slow or t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()


def memory(k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, ones: bool) -> Tensor:
    """[B, H, D, E], or [B, H, D, E + 1] with `ones`: the state that keys and values leave after `state`."""
    whole = None
    if g is not None:
        g = g[None, :, None].expand(1, -1, k.shape[2]) if g.dim() == 1 else g
        total = g.clamp(min=LOWEST).cumsum(2)
        left, whole = (total[:, :, -1:] - total).exp(), total[:, :, -1].exp()[..., None]
        k = (at_least_float32(k) * (left if left.dim() == 4 else left[..., None])).to(k.dtype)
        whole = whole if whole.dim() == 4 else whole[..., None]
    found = at_least_float32(in_dtype(k.mT, v))
    if ones:
        found = torch.cat([found, at_least_float32(k).sum(2)[..., None].to(found.dtype)], dim=-1)
    if state is None:
        return found
    return found + (state if whole is None else whole * state).to(found.dtype)


def step(q, k, v, g, state, normalise: bool, eps: float) -> tuple[Tensor, Tensor]:
    """One token: what a chunk of one needs and no more."""
    dtype = v.dtype
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    if normalise:
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)
    new = k.mT * v  # [B, H, D, E]
    if state is not None:
        if g is not None:
            g = g[:, None, None] if g.dim() == 1 else g[:, :, 0].reshape(*g.shape[:2], -1, 1)
            state = g.clamp(min=LOWEST).exp() * state
        new = new + state
    return finished(q @ new, normalise, eps, dtype), new


def both_ways(q, k, v, g, normalise: bool, eps: float, chunk: int) -> Tensor:
    """A scan in each direction; a token's own, in both, counts once."""
    dtype = v.dtype
    if normalise:
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)
    g = bounded(g, q)
    out = causal(q, k, v, g, None, chunk=chunk)[0]
    back = [t.flip(2) for t in (q, k, v)]
    back = causal(*back, g if g.dim() == 1 else g.flip(2), None, chunk=chunk)[0].flip(2)
    own = at_least_float32((q * k).sum(-1, keepdim=True)) * at_least_float32(v)
    return finished(out + back - own, normalise, eps, dtype)
