"""Meta-attention: causal softmax attention among the meta tokens of a text only; to all other tokens it gives zero.

    o_i = Σ_j softmax_j(scale · q_i·k_j + P_ij) v_j  over j <= i      P_ij = 0 if i and j are both meta tokens, else -∞

Meta tokens are learned tokens put between those of a text, about one in ten. A layer has this attention after its
causal attention, each with a residual: by the one meta tokens gather what came before them, by the other they speak to
each other. A token that is no meta token has a row of -∞ only and reads nothing: exactly 0, so its residual stream goes
by. `scale` is 1/√D. The role "meta" of a token is 1, or another positive number, if it is a meta token.

Worked by hand: scale 1, queries 1, tokens 0, 1 and 3 are meta tokens. Token 3 sees keys 0, log 3 and 0 with values 0, 5
and 10: weights 1/5, 3/5, 1/5, so 5. Token 1 reads 3/4 of 5. Token 2 reads nothing, token 0 itself.

>>> import math, torch
>>> k, v = (torch.tensor(x).view(1, 1, 4, 1) for x in ([0.0, math.log(3), 9.0, 0.0], [0.0, 5.0, 7.0, 10.0]))
>>> call = Call(roles=Roles(meta=[1, 1, 0, 1]))
>>> [round(o, 4) for o in reference(torch.ones(1, 1, 4, 1), k, v, Config(scale=1.0), call)[0].flatten().tolist()]
[0.0, 3.75, 0.0, 5.0]
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.roles import Roles
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of, quotient, softmax_attention, visible
from regard.ops.transforms import asks_values

OTHERS = "meta tokens are put into one text, and read what came before them in it"
SILENT = "a token that is no meta token reads nothing and is read by none: its rows are zero by design"


@dataclass(frozen=True)
class Config:
    scale: float | None = None  # None: D ** -0.5


def check_count(call: Call, keys: int) -> None:
    roles: Any = call.roles
    known = isinstance(roles, Roles)
    require(known, "the role meta says which keys are meta tokens: roles=Roles(meta=[...])", roles=roles)
    meta = roles["meta"]
    require(meta.shape[-1] == keys, "roles label all keys, those of the state first", meta=meta, M=keys)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    check_count(call, m)
    roles: Any = call.roles
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * scale
    meta = (roles["meta"] > 0).view(-1, 1, 1, m).to(q.device)
    sees = (meta & meta[..., m - n :].mT).expand_as(s).tril(m - n)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    s = s.masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    return quotient(e @ v_h, e.sum(-1, keepdim=True)).to(v.dtype), state


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    check_count(call, m)
    roles: Any = call.roles
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    meta = (roles["meta"] > 0).view(-1, m).to(q.device)  # [B|1, M]
    if call.pair_mask is not None or not asks_values():
        pairs = meta[:, None, m - n :, None] & meta[:, None, None]
        seen = visible(call, n, m, q.device)
        mask = pairs if seen is None else pairs & seen
        return softmax_attention(q, k, v, scale=scale, mask=mask).to(v.dtype), state
    keys, asking = chosen(meta), chosen(meta[:, m - n :])
    if asking.shape[1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3]), state
    sees = keys[:, None] <= asking[:, :, None] + (m - n)
    # rows with fewer meta tokens than others are filled up with tokens that are none
    sees = sees & meta.gather(1, keys)[:, None] & meta.gather(1, asking + (m - n))[:, :, None]
    mask = sees[:, None]
    if call.key_mask is not None:
        there = call.key_mask.expand(max(len(keys), len(call.key_mask)), -1, -1)
        mask = mask & taken(there[..., None], keys)[:, :, None, :, 0]
    out = softmax_attention(taken(q, asking), taken(k, keys), taken(v, keys), scale=scale, mask=mask)
    index = asking[:, None, :, None].expand(*out.shape)
    return torch.zeros_like(q[..., :1]).to(v.dtype).expand(-1, -1, -1, v.shape[3]).scatter(
        2, index, out
    ), state


def chosen(meta: Tensor) -> Tensor:
    """[B|1, m] places of the meta tokens in order, as many as the row with the most has; other tokens fill a row up."""
    most = int(meta.sum(-1).max())
    return (~meta).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]


def taken(t: Tensor, places: Tensor) -> Tensor:
    """[B, H, m, D] of the tokens at these places of t [B, H, M, D]."""
    return t.gather(2, places[:, None, :, None].expand(len(t), t.shape[1], -1, t.shape[3]))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("causal_self",),
    unsupported={"self": OTHERS, "cross": OTHERS, "causal_cross": OTHERS},
    pair_masks=True,
    roles=("meta",),
    test_settings=({"scale": 0.3},),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    exempt={
        "influence": SILENT,
        "queries": SILENT,
        "neutral": "where all tokens are meta tokens it is softmax attention, which roles say and no setting does",
    },
    card=Card(
        title="Meta-attention",
        paper="Language Modeling with Learned Meta-Tokens (arXiv:2509.16278)",
        year=2025,
        idea="causal attention among learned tokens that stand between those of a text, beside causal attention of all",
        cost="O(N·D + R²·(D + E)) time for R meta tokens, about N/10",
        state="every key and value so far: (D + E)·n numbers per KV head, of which those of meta tokens are read",
        needs=("decoder-lm", "qkv"),
        lineage=("softmax",),
        caveat=(
            "no code was published under a name that was found. A reading of the paper says that the meta-attention of "
            "a layer follows its causal attention, before the feed-forward part; whether it has projections of its own "
            "is left open (in the claim it has). Losses at meta tokens are dropped, which is the training's to do"
        ),
    ),
)
