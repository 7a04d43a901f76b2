"""Sigmoid attention: every key is weighed by itself, by the sigmoid of its score, and weights are not normalised.

    s_ij = scale · q_i·k_j + b
    o_i  = Σ_j σ(s_ij) v_j                             over the keys j that i sees
    b    = -log n_i unless it is given                 n_i keys are seen by query i

Softmax makes keys compete: a query that needs none of them still has a weight of one to give away, and models learn to
give it to the first token, the attention sink. Here a query may weigh all its keys near zero. Random scores would give
n/2 in all for b = 0; b = -log n brings that to about one, as in softmax. With `normalise` the weights of a query are
divided by their sum, and its keys compete again; σ(s) is e^s where b is low, so that is softmax attention then.

Worked by hand: scale 1, a query 1, keys 0 and log 3, values 4 and 8. With b = 0 the weights are 1/2 and 3/4, so the
output is 2 + 6 = 8; with b = -log 2 they are 1/3 and 3/5, which gives 4/3 + 24/5 = 6.1333.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0], [0.0, math.log(3)], [4.0, 8.0]))
>>> [round(reference(q, k, v, Config(scale=1.0, bias=b), Call("cross"))[0].item(), 4) for b in (0.0, None)]
[8.0, 6.1333]
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of, masked_softmax, quotient
from regard.ops.pointwise import keys_seen, only_seen, pointwise_attention


@dataclass(frozen=True)
class Config:
    bias: float | None = None  # b; None: -log of the number of keys that the query sees
    normalise: bool = False  # divide a query's weights by their sum
    scale: float | None = None  # None: D ** -0.5


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * (q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale)
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - s.shape[2])
    if cfg.bias is None:
        # a row that sees nothing has no weights, whatever its bias
        s = s - sees.sum(-1, keepdim=True).clamp(min=1).double().log()
    else:
        s = s + cfg.bias
    w = torch.where(sees, torch.sigmoid(s), 0)  # [B, H, N, M]
    out = w @ v_h
    return (quotient(out, w.sum(-1, keepdim=True)) if cfg.normalise else out).to(v.dtype), state


def weigh(s: Tensor, seen: Tensor | None, cfg: Config) -> Tensor:
    """Weights of scores s [B, H, R, M]."""
    s = s - keys_seen(s, seen).log() if cfg.bias is None else s + cfg.bias
    if cfg.normalise:
        # σ / Σσ, which keeps its digits where all σ are small
        return masked_softmax(F.logsigmoid(s), seen)
    return only_seen(torch.sigmoid(s), seen)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    return pointwise_attention(q, k, v, call, scale, partial(weigh, cfg=cfg)), state


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=PATTERNS,
    pair_masks=True,
    test_settings=({"bias": 0.0}, {"bias": 0.0, "normalise": True}, {"bias": -2.5, "scale": 0.3}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Sigmoid attention",
        paper="Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv:2409.04431",
        year=2024,
        idea="a sigmoid of each score in place of the softmax over all: keys do not compete, and no sink is needed",
        cost="O(N·M·(D + E)) time; scores exist for a block of rows at a time",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"bias": -50.0, "normalise": True},
        caveat=(
            "n in b = -log n is here the number of keys that a query sees, so that padding, masks and what comes later "
            "change nothing; the paper's code has one number for all queries, -7.62 = -log 2048 for its training "
            "length (give it as bias). bias=0 is the form of When Attention Sink Emerges in Language Models "
            "(arXiv:2410.10781), and its sigmoid with normalisation is normalise=True. A bias of 0 gives outputs that "
            "grow with the number of keys"
        ),
    ),
)
