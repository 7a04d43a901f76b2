"""Functions as people write them, each with one fault."""

import torch
from torch.nn import functional as F


def causal_softmax(q, k, v, sees=None):
    n, m = q.shape[2], k.shape[2]
    sees = torch.ones(n, m, dtype=torch.bool).tril(m - n) if sees is None else sees
    s = (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(~sees, -torch.inf)
    return s.softmax(-1) @ v


def no_causal_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def looks_one_ahead(q, k, v):
    n = q.shape[2]
    return causal_softmax(q, k, v, torch.ones(n, n, dtype=torch.bool).tril(1))


def window_off_by_one(q, k, v, window=4):
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return causal_softmax(q, k, v, (age >= 0) & (age <= window))


def window_without_itself(q, k, v, window=4):
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return causal_softmax(q, k, v, (age >= 0) & (age < max(1, window - 1)))


def never_accumulates(q, k, v):
    """Attention with bounded memory whose causal sum over time was forgotten: row n holds token n alone."""
    slots = torch.linspace(-1, 1, 3 * k.shape[-1], dtype=k.dtype).view(3, -1)
    alpha = k @ slots.mT  # [B, H, N, 3]
    share = (alpha - alpha.logcumsumexp(2)).exp()
    keys, values = share[..., None] * k[..., None, :], share[..., None] * v[..., None, :]  # no cumsum(2)
    w = torch.einsum("bhnd,bhnrd->bhnr", q, keys).softmax(-1)
    return torch.einsum("bhnr,bhnre->bhne", w, values)


def state_dropped(q, k, v, state=None):
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2)
    return (q[..., None, :] @ kv)[..., 0, :], kv[:, :, -1]


def state_forgets_its_decay(q, k, v, state=None):
    """The incoming state should have decayed by as many steps as tokens were read since."""
    n = q.shape[2]
    age = torch.arange(n)[:, None] - torch.arange(n)
    decay = torch.where(age >= 0, torch.tensor(0.8, dtype=q.dtype) ** age.clamp(min=0), 0)
    out = (q @ k.mT * decay) @ v
    end = (k * decay[-1][:, None]).mT @ v
    if state is not None:
        out, end = out + q @ state, end + state
    return out, end


def gradient_cut(q, k, v):
    """The normaliser is treated as a constant."""
    e = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() * (q @ k.mT * q.shape[-1] ** -0.5).exp()
    return e / e.sum(-1, keepdim=True).detach() @ v


def padding_attended(q, k, v, mask=None):
    """Scores of hidden keys are zero, which is not nothing."""
    s = q * q.shape[-1] ** -0.5 @ k.mT
    s = s if mask is None else s.masked_fill(~mask, 0)
    return causal_from(s) @ v


def causal_from(s):
    n, m = s.shape[-2:]
    return s.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf).softmax(-1)


def lengths_one_too_many(q, k, v, lengths=None):
    key_mask = torch.ones(1, k.shape[2], dtype=torch.bool)
    key_mask = key_mask if lengths is None else torch.arange(k.shape[2]) <= lengths[:, None]
    s = (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(~key_mask[:, None, None], -torch.inf)
    return s.softmax(-1) @ v


def normalised_over_the_batch(q, k, v):
    return causal_softmax(q, (k - k.mean(0)) / (k.std(0, correction=0) + 1), v)


def state_leaks_between_rows(q, k, v):
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2)
    kv = kv + 0.1 * kv.roll(1, 0)
    return (q[..., None, :] @ kv)[..., 0, :]


def overflow(q, k, v):
    e = (q @ k.mT * q.shape[-1] ** -0.5).exp().tril(k.shape[2] - q.shape[2])
    return e / e.sum(-1, keepdim=True) @ v


def blind_rows_are_nan(q, k, v, mask=None):
    s = q * q.shape[-1] ** -0.5 @ k.mT
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return causal_from(s) @ v


def triangle_of_the_first_keys(q, k, v):
    """Right for a whole text; beside stored keys the queries are taken for the first ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def scaled_after_the_product(q, k, v):
    """Products of 8e4 are infinite in float16, scores of 4e4 are not."""
    n, m = q.shape[2], k.shape[2]
    s = q @ k.mT * q.shape[-1] ** -0.5
    return s.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf).softmax(-1) @ v


def float16_by_way_of_float8(q, k, v):
    q, k = (t.to(torch.float8_e4m3fn).to(t.dtype) if t.dtype == torch.float16 else t for t in (q, k))
    return causal_softmax(q, k, v)


def kv_heads_in_the_wrong_order(q, k, v):
    """Query head h reads KV head h mod G, not h // (H / G)."""
    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
    return causal_softmax(q, k, v)


def padding_shown_again(q, k, v, mask=None, state=None):
    """The mask is obeyed, but not where it hides keys that are stored already."""
    stored = 0 if state is None else state[0].shape[2]
    if state is not None:
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
    n, m = q.shape[2], k.shape[2]
    sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if mask is not None:
        sees = sees & (mask | (torch.arange(m) < stored))
    dead = ~sees.any(-1, keepdim=True)
    s = (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(~sees, -torch.inf)
    return s.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0) @ v, (k, v)


def low_precision_inside(q, k, v):
    q, k = (t.to(torch.float8_e4m3fn).to(t.dtype) if t.dtype == torch.bfloat16 else t for t in (q, k))
    return causal_softmax(q, k, v)


def changes_its_input(q, k, v):
    with torch.no_grad():
        q.mul_(1.01)
    return causal_softmax(q, k, v)


def needs_even_lengths(q, k, v):
    pairs = q.unflatten(2, (-1, 2))
    return causal_softmax(pairs.flatten(2, 3), k, v)


def scaled_by_the_values(q, k, v):
    """Sound in itself, and not softmax attention as it is known."""
    return causal_softmax(q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v)


def triangle_in_cross(q, k, v, pattern="cross"):
    return causal_softmax(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())


def needs_a_gate(q, k, v, gate):
    return gate * v


def raises(q, k, v):
    return q @ k


def wrong_shape(q, k, v):
    return causal_softmax(q, k, v).transpose(1, 2)


def chunk_forgets_the_last(q, k, v):
    """Linear attention in chunks of 64; what is handed on lacks the last token of the chunk."""
    rows, state = [], 0
    for start in range(0, q.shape[2], 64):
        q_c, k_c, v_c = (t[:, :, start : start + 64] for t in (q, k, v))
        rows.append((q_c @ k_c.mT).tril() @ v_c + (q_c @ state if start else 0))
        state = state + k_c[:, :, :-1].mT @ v_c[:, :, :-1]
    return torch.cat(rows, 2)
