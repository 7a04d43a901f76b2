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

A hidden key is as if it were not there: it adds nothing and does not decay. Masks are of keys, as a sum that all
queries share cannot leave one out. States are float32 at least, [B, H, D, E], or [B, H, D, E + 1] with normalise,
whose last column is z.

A page gives its `Form`; `run_form` is the fast path that follows from it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.call import Call
from regard.core.errors import Unsupported, require
from regard.ops.backend import causal, on_triton
from regard.ops.chunk import LOWEST
from regard.ops.machine import product_dtype
from regard.ops.softmax import at_least_float32, lower_right, per_query_head

CHUNK = 64


class Form(NamedTuple):
    """What a linear page is made of: o = φ(q) Σ e^{decays} φ(k)ᵀ v, over the same sum of φ(k) where it normalises.

    q, k       features of queries [B, H, N, F] and of keys [B, G, M, F]     v  values [B, G, M, E]
    log_decay  None, [H], [B, H, M] or [B, H, M, F], <= 0
    normalise  whether outputs are divided by φ(q) Σ e^{decays} φ(k)ᵀ + eps
    state      what the sums begin with; None: nothing
    finish     finish(out, state) -> (out, state), what the page does after the sums; None: nothing
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    normalise: bool = False
    eps: float = 0.0
    state: Tensor | None = None
    finish: Callable[[Tensor, Tensor | None], tuple[Tensor, Any]] | None = None


def run_form(
    form: Callable[..., Form], q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call
) -> tuple[Tensor, Any]:
    """The fast path of a page that gives form(q, k, v, cfg, call); cfg.chunk, if it has one, sets the chunk.

    Whatever the dtype of its values, out is in that of v.
    """
    parts = form(q, k, v, cfg, call)
    out, state = linear(
        parts.q, parts.k, parts.v, parts.log_decay, pattern=call.pattern, key_mask=call.key_mask, state=parts.state,
        normalise=parts.normalise, eps=parts.eps, chunk=getattr(cfg, "chunk", CHUNK), backend=call.backend,
    )  # fmt: skip
    out, state = (out, state) if parts.finish is None else parts.finish(out, state)
    return out.to(v.dtype), state


def shown(t: Tensor, key_mask: Tensor | None) -> Tensor:
    """Keys, values or features [B, G|H, M, ...] with zeros where the key mask says that nothing is."""
    if key_mask is None:
        return t
    fits = key_mask.shape[1] in (1, t.shape[1])
    require(fits, "a mask by head stands beside tensors of as many heads", mask=key_mask, tensor=t)
    return t.masked_fill(~key_mask[..., None], 0)


def prepared(q, k, v, log_decay, key_mask, normalise):
    """(q, k, v per query head with hidden keys zeroed, decay or None): what both forms below start from."""
    k, v = (per_query_head(t, q.shape[1]).expand(-1, q.shape[1], -1, -1) for t in (k, v))
    k, v = shown(k, key_mask), shown(v, key_mask)
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if log_decay is None:
        return q, k, v, None
    g = at_least_float32(log_decay)
    if key_mask is not None:
        g = g[:, None].expand(-1, k.shape[2])[None] if g.dim() == 1 else g
        g = g.masked_fill(~(key_mask if g.dim() == 3 else key_mask[..., None]), 0)
    return q, k, v, g


def finished(out: Tensor, normalise: bool, eps: float, dtype: torch.dtype) -> Tensor:
    if normalise:
        total = out[..., -1:] + eps
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
    return out.to(dtype)


def dense_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, pattern: str = "causal_self",
    key_mask: Tensor | None = None, state: Tensor | None = None, normalise: bool = False, eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition through all N x M weights: (out [B, H, N, E], state). Quadratic, exact, on any device."""
    dtype = v.dtype
    q, k, v, g = prepared(q, k, v, log_decay, key_mask, normalise)
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    g = k.new_zeros(1, 1, 1) if g is None else g.to(k.dtype).clamp(min=LOWEST)
    g = g[None, :, None] if g.dim() == 1 else g
    g = (g[..., None] if g.dim() == 3 else g).expand(*k.shape)  # [B, H, M, D]
    total = g.double().cumsum(2)  # the decay up to and with a token; differences of sums lose digits
    n, m = q.shape[2], k.shape[2]
    s, t = torch.arange(m, device=q.device), torch.arange(m - n, m, device=q.device)[:, None]
    if "cross" in pattern:
        between = (total[:, :, -1:, None] - total[:, :, None]).expand(-1, -1, n, -1, -1)
    else:
        past = (s <= t)[..., None]
        between = (total[:, :, m - n :, None] - total[:, :, None]).masked_fill(~past, -torch.inf)
        if pattern == "self":
            before = total - g.double()
            ahead = (before[:, :, None] - before[:, :, :, None]).masked_fill(past, -torch.inf)
            between = torch.where(past, between, ahead)
    weights = torch.einsum("bhnd,bhnmd,bhmd->bhnm", q, between.exp().to(q.dtype), k)
    out = weights @ v
    if pattern != "causal_self":
        return finished(out, normalise, eps, dtype), None
    end = (k * (total[:, :, -1:] - total).exp().to(k.dtype)).mT @ v  # [B, H, D, E]
    if state is not None:
        total = total.exp().to(q.dtype)
        out = out + (q * total[:, :, m - n :]) @ state.to(q.dtype)
        end = end + total[:, :, -1, :, None] * state.to(q.dtype)
    return finished(out, normalise, eps, dtype), end


def undecayed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(Q Kᵀ) V over the keys that a query may see, what linear attention is without feature map, decay and
    denominator: the neutral base of pages that add to it."""
    weights = at_least_float32(q) @ at_least_float32(per_query_head(k, q.shape[1])).mT
    seen = None if call.key_mask is None else call.key_mask[:, :, None]
    if call.pattern == "causal_self":
        lower = lower_right(q.shape[2], k.shape[2], q.device)
        seen = lower if seen is None else seen & lower
    weights = weights if seen is None else weights.masked_fill(~seen, 0)
    return (weights @ at_least_float32(per_query_head(v, q.shape[1]))).to(v.dtype)


def linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, pattern: str = "causal_self",
    key_mask: Tensor | None = None, state: Tensor | None = None, normalise: bool = False, eps: float = 1e-6,
    chunk: int = CHUNK, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As dense_linear, in time and memory that grow with N + M: (out [B, H, N, E], state).

    Products are taken in the input's dtype where the machine multiplies it; sums, decays and states in float32 at
    least. `chunk` changes the speed, never the result; `backend` is "auto", "torch" or "triton", which raises where
    there is no kernel.
    """
    n, dtype = q.shape[2], v.dtype
    q, k, v, g = prepared(q, k, v, log_decay, key_mask, False)
    if backend == "triton" and (n == 1 if pattern == "causal_self" else pattern != "self" or g is None):
        raise Unsupported("this pattern or length has no Triton kernel; ask for impl='auto'")
    if pattern == "causal_self":
        earlier = k.shape[2] - n
        if earlier:  # keys before the first query
            before = cut(g, slice(earlier))
            state = memory(k[:, :, :earlier], v[:, :, :earlier], before, state, normalise)
            k, v, g = k[:, :, earlier:], v[:, :, earlier:], cut(g, slice(earlier, None))
        if n == 1:
            return step(q, k, v, g, state, normalise, eps)
        g = bounded(g, q, backend)
        return causal(q, k, v, g, state, chunk=chunk, normalise=normalise, eps=eps, backend=backend)
    if pattern == "self" and g is not None:
        return both_ways(q, k, v, g, normalise, eps, chunk, backend), None
    state = memory(k, v, g, None, normalise)
    return read(q, state, normalise, eps, dtype), None


def bounded(g: Tensor | None, q: Tensor, backend: str) -> Tensor | None:
    """Torch's tiles do it themselves, in cache; a kernel takes gates as they are."""
    return g.clamp(min=LOWEST) if g is not None and on_triton(q, backend) else g


def cut(g: Tensor | None, tokens: slice) -> Tensor | None:
    return g if g is None or g.dim() == 1 else g[:, :, tokens]


def read(q: Tensor, state: Tensor, normalise: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """What queries find in a state; the product in their dtype."""
    state = state.to(q.dtype) if product_dtype(q) == torch.bfloat16 else state
    if not normalise:
        return in_dtype(q, state).to(dtype)
    total = at_least_float32(in_dtype(q, state[..., -1:])) + eps
    return (in_dtype(q, state[..., :-1]) / total.masked_fill(total == 0, 1)).to(dtype)


def in_dtype(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in bfloat16 if both are and it is multiplied here, else in float32 at least."""
    if not product_dtype(a) == product_dtype(b) == torch.bfloat16:
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
        left, whole = decays_left(g.clamp(min=LOWEST))
        left, whole = left.exp(), whole.exp()[..., None]
        k = (at_least_float32(k) * (left if left.dim() == 4 else left[..., None])).to(product_dtype(k))
        whole = whole if whole.dim() == 4 else whole[..., None]
    added = at_least_float32(in_dtype(k.mT, v))
    if ones:
        added = torch.cat([added, at_least_float32(k).sum(2)[..., None].to(added.dtype)], dim=-1)
    if state is None:
        return added
    return added + (state if whole is None else whole * state).to(added.dtype)


def decays_left(g: Tensor) -> tuple[Tensor, Tensor]:
    """(sums of g [B, H, M, ..] over the tokens after each, the sum over all). From the end, where they are small: a
    difference of two sums over a long text keeps few digits."""
    upto = g.flip(2).cumsum(2).flip(2)
    return torch.cat([upto[:, :, 1:], torch.zeros_like(upto[:, :, :1])], dim=2), upto[:, :, 0]


def step(q, k, v, g, state, normalise: bool, eps: float) -> tuple[Tensor, Tensor]:
    """One token: what a chunk of one needs and no more."""
    dtype = v.dtype
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)
    new = k.mT * v  # [B, H, D, E]
    if state is not None:
        if g is not None:
            g = g[:, None, None] if g.dim() == 1 else g[:, :, 0].reshape(*g.shape[:2], -1, 1)
            state = g.clamp(min=LOWEST).exp() * state
        new = new + state
    return finished(q @ new, normalise, eps, dtype), new


def both_ways(q, k, v, g, normalise: bool, eps: float, chunk: int, backend: str) -> Tensor:
    """A scan in each direction; a token's own, in both, counts once."""
    dtype = v.dtype
    # parts of a sum that float16 holds may leave its range; products are in float32 all the same
    v = v.float() if dtype == torch.float16 else v
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)
    g = bounded(g, q, backend)
    out = causal(q, k, v, g, None, chunk=chunk, backend=backend)[0]
    flipped = [t.flip(2) for t in (q, k, v)]
    back = causal(*flipped, g if g.dim() == 1 else g.flip(2), None, chunk=chunk, backend=backend)[0].flip(2)
    itself = at_least_float32((q * k).sum(-1, keepdim=True)) * at_least_float32(v)
    return finished(out + back - itself, normalise, eps, dtype)
