"""DeltaNet: a linear attention that corrects what its state says about a key instead of adding to it.

    S_t = S_{t-1} + β_t k_tᵀ (v_t - k_t S_{t-1})       a [D, E] state per head; β_t = sigmoid(x_t W_β)
    o_t = q_t S_t                                      q and k are divided by their length first

k_t S_{t-1} is what the state would answer to k_t now. The difference to v_t is written, a share β_t of it, so with
β = 1 an old value of the same key is replaced; the sum of linear attention would return both. It is one step of
gradient descent on |v_t - k_t S|² per token.

self and cross read the state that the whole text, or memory, has left: writes keep their order, so where keys overlap
the later token counts more, but every query sees all of them.

`fast` takes a chunk of C writes at once. Their corrections U solve (I + tril(β K Kᵀ, -1)) U = β (V - K S), a
triangular system without inverses of growing size; what does not depend on S is solved for all chunks together.

Worked by hand: one key twice with β = 1/2 and value 4: S = 2, then 2 + (4 - 2)/2 = 3.

>>> import torch
>>> one = torch.ones(1, 1, 2, 1, dtype=torch.float64)
>>> call = Call(params={"w_beta": torch.zeros(1, 1)}, x=torch.ones(1, 2, 1))
>>> out, _ = reference(one, one, 4 * one, Config(), call)
>>> [round(o, 4) for o in out.flatten().tolist()]
[2.0, 3.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, initial, per_query_head, recurrence, rounded, shown
from regard.ops.features import pad_tokens


@dataclass(frozen=True)
class Config:
    eps: float = 1e-6  # added to the squared length that a query or key is divided by
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)
        require(self.eps > 0, "eps > 0", eps=self.eps)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    width = dims["width"]
    return {"w_beta": torch.empty(width, dims["heads"]).uniform_(-1, 1) * width**-0.5}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    q_h, k_h = (t / (t.square().sum(-1, keepdim=True) + cfg.eps).sqrt() for t in (q_h, k_h))
    x, w_beta = exact(call.x_of_keys, call.params["w_beta"])
    beta = torch.einsum("bmc,ch->bhm", x, w_beta).sigmoid()

    def write(s: Tensor, t: int) -> Tensor:
        answer = torch.einsum("bhd,bhde->bhe", k_h[:, :, t], s)
        correction = beta[:, :, t, None] * (v_h[:, :, t] - answer)
        return s + torch.einsum("bhd,bhe->bhde", k_h[:, :, t], correction)

    def read(s: Tensor, i: int) -> Tensor:
        return torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3])
    return rounded(*recurrence(s, write, read, n, m, call), v)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, dtype = q.shape[2], k.shape[2], v.dtype
    q, k, v, beta = tensors(q, k, v, cfg, call)
    state = call.initial_state
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.to(k.dtype)
    k_c, *rest = chunks(k, v, beta, size=min(cfg.chunk, m))
    known, pull = corrections(k_c, *rest)
    if call.pattern != "causal_self":
        for c in range(k_c.shape[2]):
            state = state + k_c[:, :, c].mT @ (known[:, :, c] - pull[:, :, c] @ state)
        return (q @ state).to(dtype), None
    # the last query is that of the last key
    (q_c,) = chunks(pad_tokens(q, before=m - n), size=k_c.shape[3])
    inside, rows = (q_c @ k_c.mT).tril(), []
    for c in range(k_c.shape[2]):
        write = known[:, :, c] - pull[:, :, c] @ state  # [B, H, C, E]
        rows.append(q_c[:, :, c] @ state + inside[:, :, c] @ write)
        state = state + k_c[:, :, c].mT @ write
    return torch.cat(rows, dim=2)[:, :, m - n : m].to(dtype), state


def tensors(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Tensor, ...]:
    """q [B, H, N, D], k, v and β [B, H, M, 1] per query head, float32 at least; zeros for a hidden token."""
    heads = q.shape[1]
    k, v = (at_least_float32(per_query_head(t, heads)).expand(-1, heads, -1, -1) for t in (k, v))
    k, v = shown(k, call.key_mask), shown(v, call.key_mask)
    q, k = (t * (t.square().sum(-1, keepdim=True) + cfg.eps).rsqrt() for t in (at_least_float32(q), k))
    beta = (call.x_of_keys.to(k.dtype) @ call.params["w_beta"].to(k.dtype)).sigmoid()
    return q, k, v, shown(beta.mT[..., None], call.key_mask)


def chunks(*tensors: Tensor, size: int) -> tuple[Tensor, ...]:
    """Each [B, H, M, ...] as [B, H, chunks, C, ...], zeros behind the last token."""
    return tuple(pad_tokens(t, after=-t.shape[2] % size).unflatten(2, (-1, size)) for t in tensors)


def corrections(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(U of an empty state, what U loses to a state S: U - pull S), for every chunk."""
    lower = (beta * k @ k.mT).tril(-1)  # [B, H, chunks, C, C]
    right = beta * torch.cat([v, k], dim=-1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    needs_x=True,
    needs_norm=True,
    order_aware=True,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    test_settings=({"chunk": 4},),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    exempt={"neutral": "no setting turns its correction off: it is the method"},
    card=Card(
        title="DeltaNet (the delta rule)",
        paper=(
            "Linear Transformers Are Secretly Fast Weight Programmers (2021); Parallelizing Linear Transformers with "
            "the Delta Rule over Sequence Length (2024)"
        ),
        year=2021,
        idea="write the difference between a value and what the state already answers to its key",
        cost="O((N + M)·(D·E + chunk·(D + E))) time",
        state="D·E numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("linear_attention",),
        caveat=(
            "the length of queries and keys is one, as in the paper of 2024 (in that of 2021 their features sum to "
            "one); the SiLU and the short convolution before them and the norm after it belong to the layer; the forms "
            "for self and cross are not the papers'"
        ),
    ),
)
