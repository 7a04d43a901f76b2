"""Pointer network: additive attention whose weights are the answer, a distribution over the positions of the input.

    u_ij = vᵀ tanh(W_1 e_j + W_2 d_i)       e_j encoder states (keys), d_i decoder states (queries)
    p_i  = softmax_j(u_ij)                  which input stands at place i of the output
    o_i  = Σ_j p_ij v_j

where W_1, W_2 [A, D] and v [A] are learned, for each head. The dictionary of the output is the input itself, so it
grows with it: a network trained on ten inputs can name the fifteenth. The paper blends no values: p_i is what is
trained and read, and `aux["weights"]` [B, H, N, M] holds it. With values that are the one-hot vectors of positions the
output is p_i too; with encoder states as values it is the blend of additive attention (Bahdanau et al., 2014), which
the paper sets itself against. Inputs that may not be named twice are hidden by a mask of pairs.

Worked by hand: one channel, W_1 = W_2 = 1, v = log 3, a query of 0 and keys 0 and 20, whose tanh are 0 and 1: scores
0 and log 3, so the first is pointed at by 1/4, the second by 3/4. Values are the one-hot vectors of the two.

>>> import math, torch
>>> params = {"key": torch.ones(1, 1, 1), "query": torch.ones(1, 1, 1), "score": torch.tensor([[math.log(3)]])}
>>> q, k, v = torch.zeros(1, 1, 1, 1), torch.tensor([0.0, 20.0]).view(1, 1, 2, 1), torch.eye(2)[None, None]
>>> reference(q, k, v, Config(), Call("cross", params=params))[0].flatten()
tensor([0.2500, 0.7500])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    carried,
    exact,
    heads_of,
    masked_softmax,
    matmul,
    mix,
    per_query_head,
    quotient,
    row_blocks,
    visible,
)


@dataclass(frozen=True)
class Config:
    width: int | None = None  # A, of the sums; None: D

    def __post_init__(self) -> None:
        require(self.width is None or self.width >= 1, "width >= 1", width=self.width)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, key = dims["heads"], dims["key"]
    width = cfg.width or key

    def uniform(*shape: int) -> Tensor:
        return torch.empty(*shape).uniform_(-1, 1) * shape[-1] ** -0.5

    return {
        "key": uniform(heads, width, key),
        "query": uniform(heads, width, key),
        "score": uniform(heads, width),
    }


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict[str, Tensor]]:
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    w_1, w_2, w = exact(*(call.params[name] for name in ("key", "query", "score")))
    e, d = torch.einsum("had,bhmd->bhma", w_1, k_h), torch.einsum("had,bhnd->bhna", w_2, q_h)
    u = torch.einsum("ha,bhnma->bhnm", w, torch.tanh(e[:, :, None] + d[:, :, :, None]))
    sees = torch.ones_like(u, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(u.shape[3] - u.shape[2])
    u = u.masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = u.amax(-1, keepdim=True).detach()
    e = (u - top.masked_fill(top == -torch.inf, 0)).exp()
    p = quotient(e, e.sum(-1, keepdim=True))
    return (p @ v_h).to(v.dtype), state, {"weights": p.to(v.dtype)}


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict[str, Tensor]]:
    k, v, state = carried(k, v, call)
    (batch, heads, n, _), m = q.shape, k.shape[2]
    w_1, w_2 = (call.params[name].to(q.dtype).mT for name in ("key", "query"))
    keys = at_least_float32(matmul(per_query_head(k, heads), w_1))  # [B, H, M, A]
    queries = at_least_float32(matmul(q, w_2))
    w = call.params["score"].to(keys.dtype)[:, None, :, None]
    seen, parts = visible(call, n, m, q.device), []
    for rows in row_blocks(n, batch * heads * m * w.shape[2]):
        u = (queries[:, :, rows, None] + keys[:, :, None]).tanh_() @ w  # [B, H, r, M, 1]
        cut = seen if seen is None or seen.shape[-2] == 1 else seen[..., rows, :]
        parts.append(masked_softmax(u[..., 0], cut))
    p = torch.cat(parts, dim=2) if len(parts) != 1 else parts[0]
    return mix(p, v), state, {"weights": p.to(v.dtype)}


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    pair_masks=True,
    test_settings=({"width": 3},),
    transfer="weights",
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    exempt={"neutral": "its scores are additive: no setting makes them products of queries and keys"},
    card=Card(
        title="Pointer network",
        paper="Pointer Networks, arXiv:1506.03134",
        year=2015,
        idea="additive scores of a decoder state against every encoder state; their softmax is the output itself",
        cost="O(N·M·A) time with a tanh for each number of it, in blocks of rows; the N × M weights are returned",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        lineage=("softmax",),
        caveat=(
            "the paper's use is cross with one head, decoder states asking encoder states, and no value is mixed: read "
            "aux['weights'], or give one-hot values. The recurrent encoder and decoder, whose next input is the chosen "
            "one, belong to the model; the self patterns are the same scores, which the paper does not use. Weights "
            "begin uniform within ±1/√(what they sum over), where the paper has ±0.08 at 256 and 512 units. There is "
            "no official code; a well-known one (devsisters) puts a glimpse, a softmax read of the encoder states, "
            "before the pointer, and a terminal symbol at position 0, neither of them in the paper's equation"
        ),
    ),
)
