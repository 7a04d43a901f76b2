"""Functions as people write them, one of each family, without a fault."""

import torch
from torch.nn import functional as F

HALF = (torch.bfloat16, torch.float16)


def lower_right(n, m):
    """[n, m]: the last query is that of the last key."""
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def softmax(q, k, v, mask=None, state=None, causal=True, scale=None):
    """Stored keys and values as the state; masks of keys or of pairs."""
    if state is not None:
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
    n, m = q.shape[2], k.shape[2]
    sees = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
    sees = sees if mask is None else sees & mask
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = (q @ k.mT).float() if q.dtype in HALF else q @ k.mT
    s = s.masked_fill(~sees, -torch.inf)
    dead = ~sees.any(-1, keepdim=True)
    w = s.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
    return w.to(v.dtype) @ v, (k, v)


def sdpa(query, key, value, is_causal=True):
    mask = lower_right(query.shape[2], key.shape[2]) if is_causal else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def windowed(q, k, v, window=4, attn_mask=None):
    """Every query sees the last `window` keys, its own included."""
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    sees = (age >= 0) & (age < window)
    sees = sees if attn_mask is None else sees & attn_mask
    blind = ~sees.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees | blind)
    return out.masked_fill(blind, 0)


def linear(q, k, v, initial_state=None, output_final_state=False):
    """Causal linear attention with features elu + 1 and a normaliser, sums in float32 at least."""
    dtype = v.dtype
    q, k, v = (t.float() if t.dtype in HALF else t for t in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2)
    z = k.cumsum(2)
    if initial_state is not None:
        kv, z = kv + initial_state[0][:, :, None], z + initial_state[1][:, :, None]
    out = (q[..., None, :] @ kv)[..., 0, :] / ((q * z).sum(-1, keepdim=True) + 1e-6)
    return out.to(dtype), (kv[:, :, -1], z[:, :, -1]) if output_final_state else None


def retention(q, k, v, state=None):
    """A recurrence with a decay, token by token, that knows float32 only."""
    state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    rows = []
    for t in range(q.shape[2]):
        state = 0.9 * state + k[:, :, t, :, None].float() * v[:, :, t, None, :].float()
        rows.append((q[:, :, t, None].float() @ state).to(v.dtype))
    return torch.cat(rows, 2), state


def float64_alone(q, k, v):
    if q.dtype != torch.float64:
        raise TypeError("float64")
    return sdpa(q, k, v)


def padded(q, k, v, key_padding_mask=None):
    """Noncausal, with torch's polarity of the padding mask."""
    s = q * q.shape[-1] ** -0.5 @ k.mT
    if key_padding_mask is None:
        return s.softmax(-1) @ v
    hidden = key_padding_mask[:, None, None]
    w = s.masked_fill(hidden, torch.finfo(s.dtype).min).softmax(-1).masked_fill(hidden, 0)
    return w @ v


def by_length(q, k, v, lengths=None, pattern="self"):
    """Lengths instead of a mask; the patterns by name."""
    n, m = q.shape[2], k.shape[2]
    sees = lower_right(n, m) if pattern == "causal_self" else torch.ones(n, m, dtype=torch.bool)
    sees = sees.expand(q.shape[0], 1, n, m)
    if lengths is not None:
        sees = sees & (torch.arange(m) < lengths[:, None, None, None])
    s = (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(~sees, -torch.inf)
    return s.softmax(-1).masked_fill(~sees, 0) @ v


class Attention(torch.nn.Module):
    """A module with weights in float32 is a function too."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(
            q * self.mix, k, v, attn_mask=lower_right(q.shape[2], k.shape[2])
        )


attention = Attention()
