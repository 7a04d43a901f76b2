"""ReLU attention: the ReLU of each score over the number of keys, in place of the softmax.

    s_ij = scale · q_i·k_j
    o_i  = n_i^-α Σ_j max(s_ij, 0)^p v_j                    over the n_i keys j that query i sees; α = 1, p = 1

A key whose score is negative has no weight at all, and no sum over keys has to be known before values are mixed.
Without the division by n the outputs grow with the length, which costs accuracy; with α = 1 about half of the weights
are positive and their sum stays near a constant. p = 2 is the squared ReLU.

Worked by hand: scale 1, a query 2, keys 1, -1 and 3, values 1, 10 and 2: the scores are 2, -2 and 6, the output
(2·1 + 6·2) / 3 = 14/3. With p = 2 it is (4·1 + 36·2) / 3 = 76/3, with α = 0 and p = 1 it is 14.

>>> import torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([2.0], [1.0, -1.0, 3.0], [1.0, 10.0, 2.0]))
>>> for cfg in (Config(scale=1.0), Config(scale=1.0, power=2), Config(scale=1.0, alpha=0.0)):
...     print(round(reference(q, k, v, cfg, Call("cross"))[0].item(), 4))
4.6667
25.3333
14.0
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of
from regard.ops.pointwise import keys_seen, only_seen, pointwise_attention


@dataclass(frozen=True)
class Config:
    alpha: float = 1.0  # weights are divided by n^α
    power: int = 1  # p; 2: squared ReLU
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.power >= 1, "power >= 1", power=self.power)


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
    w = torch.where(sees, s.clamp(min=0) ** cfg.power, 0)  # [B, H, N, M]
    # a row that sees nothing has no weights to divide
    count = sees.sum(-1, keepdim=True).clamp(min=1).double()
    return (w @ v_h / count**cfg.alpha).to(v.dtype), state


def weigh(s: Tensor, seen: Tensor | None, cfg: Config) -> Tensor:
    """Weights of scores s [B, H, R, M]."""
    w = F.relu(s) if cfg.power == 1 else F.relu(s) ** cfg.power
    return only_seen(w * keys_seen(s, seen) ** -cfg.alpha, seen)


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
    test_settings=({"power": 2}, {"alpha": 0.5, "scale": 0.3}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    exempt={
        "neutral": "weights are a polynomial of the score's positive part: no setting makes them e^s over a sum"
    },
    card=Card(
        title="ReLU attention",
        paper="Replacing softmax with ReLU in Vision Transformers, arXiv:2309.08586",
        year=2023,
        idea="the ReLU of each score over the number of keys: keys do not compete, half of the weights are exact zeros",
        cost="O(N·M·(D + E)) time; scores exist for a block of rows at a time",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv",),
        lineage=("softmax",),
        caveat=(
            "the paper divides by the sequence length L (tokens of an image all see each other); here n is "
            "the number of keys that a query sees, which is L in `self`, and its own place in causal_self, which the "
            "paper does not have"
        ),
    ),
)
