"""Mixture-of-head attention: every token chooses which heads answer it, and how much each of them counts.

    MHA(x) = Σ_h O_h W_h        the output projection adds the heads up, so they can be weighed:  Σ_h g_h O_h W_h
    g_h    = a_1 · S · softmax(W_s x)_h                                      the first S heads: shared, always on
    g_h    = a_2 · k · softmax(W_r x)_h / Σ_top softmax(W_r x)               the k highest of the others; else 0
    [a_1, a_2] = 2 softmax(W_g x)
    balance = E² mean_h(mean_t softmax(W_r x_t)_h · mean_t [h is chosen by t])            E = H - S routed heads

where x is the layer's input at the query. The factors S, k and 2 make a gate of 1 out of routers that say nothing, so
with all heads on and W = 0 this is multi-head attention. `balance`, added to a model's loss (times 0.01), keeps tokens
from choosing the same heads: it is k where they are spread evenly, else more; `aux` has it, and the gates. With
router="norms" nothing is learned: a token chooses the heads with its longest queries, and gates are 0 or 1.

Worked by hand: four heads, one shared, the routed ones with W_r x = log 1, log 2 and log 5: the shares are 1/8, 2/8
and 5/8. With active = 3/4 two of them are chosen, gates 2 · 2/7 and 2 · 5/7.

>>> import torch
>>> params = {"shared": torch.zeros(1, 1), "routed": torch.tensor([[1.0], [2.0], [5.0]]).log()}
>>> params["kinds"] = torch.zeros(2, 1)
>>> q, call = torch.ones(1, 4, 1, 2), Call("self", params=params, x=torch.ones(1, 1, 1))
>>> reference(q, q, q, Config(active=0.75, shared=0.25), call)[0][0, :, 0, 0]
tensor([1.0000, 0.0000, 0.5714, 1.4286])
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, exact, heads_of, quotient, visible
from regard.ops.chosen import attend_chosen


@dataclass(frozen=True)
class Config:
    active: float = 0.75  # share of the heads that answer a token, shared ones included
    shared: float = 0.5  # share of the heads that answer every token: the first ones
    # or "norms": nothing is learned, a token takes the heads of its longest queries
    router: Literal["learned", "norms"] = "learned"

    def __post_init__(self) -> None:
        require(0 < self.active <= 1, "0 < active <= 1", active=self.active)
        require(
            0 <= self.shared <= self.active, "0 <= shared <= active", shared=self.shared, active=self.active
        )


def counts(cfg: Config, heads: int) -> tuple[int, int]:
    """(heads that are shared, routed heads that a token chooses): shares rounded down, one routed head at least.

    >>> counts(Config(), 32), counts(Config(), 2), counts(Config(shared=1.0, active=1.0), 4)
    ((16, 8), (1, 1), (4, 0))
    """
    shared, active = (math.floor(share * heads + 1e-9) for share in (cfg.shared, cfg.active))
    return shared, max(active - shared, 1) if shared < heads else 0


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    if cfg.router == "norms":
        return {}
    shared, chosen = counts(cfg, dims["heads"])
    rows = {"shared": shared, "routed": dims["heads"] - shared, "kinds": 2 if shared and chosen else 0}
    return {name: 0.02 * torch.randn(n, dims["width"]) for name, n in rows.items() if n}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    """Every head for every token; the gates head by head."""
    n, heads = q.shape[2:0:-1]
    shared = int(cfg.shared * heads + 1e-9)
    chosen = 0 if shared == heads else max(int(cfg.active * heads + 1e-9) - shared, 1)
    k, v, state = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * q.shape[3] ** -0.5
    sees = torch.ones_like(s, dtype=torch.bool)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        sees = sees if mask is None else sees & mask
    if call.pattern == "causal_self":
        # the last query is that of the last key
        sees = sees.tril(s.shape[3] - n)
    s = s.masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    o = quotient(e @ v_h, e.sum(-1, keepdim=True))  # [B, H, N, E]

    if cfg.router == "norms":
        score, a, own = q_h.square().sum(-1).sqrt()[:, shared:], None, None
    else:
        x = call.x_of_queries.double()[:, call.x_of_queries.shape[1] - n :]
        score, own, a = ((x @ call.params[p].double().T).mT.softmax(1) if p in call.params else None
                         for p in ("routed", "shared", "kinds"))  # fmt: skip
    gates = [torch.ones_like(q_h[:, 0, :, 0]) if own is None else shared * own[:, h] for h in range(shared)]
    gates = [g if a is None else 2 * a[:, 0] * g for g in gates]
    on = []
    for h in range(heads - shared):
        before = (score[:, :h] >= score[:, h, None]).sum(1) + (score[:, h + 1 :] > score[:, h, None]).sum(1)
        on.append((before < chosen).double())
    for h in range(heads - shared):
        share = score[:, h] / sum(on[i] * score[:, i] for i in range(heads - shared))
        gate = chosen * share * (1.0 if a is None else 2 * a[:, 1])
        gates.append(on[h] * (1.0 if cfg.router == "norms" else gate))
    g = torch.stack(gates, dim=1)
    aux = {"gates": g}
    if cfg.router == "learned" and on:
        real = torch.ones_like(g[:, 0])
        if call.key_mask is not None and not call.cross:
            real = real * call.key_mask.any(1)[:, call.key_mask.shape[2] - n :]
        means = [(score[:, h] * real).sum() * (on[h] * real).sum() / real.sum() ** 2 for h in range(len(on))]
        aux["balance"] = len(on) * sum(means)
    return (g[..., None] * o).to(v.dtype), state, aux


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    gates, aux = norm_gates(q, cfg) if cfg.router == "norms" else learned_gates(q, cfg, call)
    square = call.pattern == "causal_self" and call.key_mask is None and call.pair_mask is None and n == m
    mask = None if square else visible(call, n, m, q.device)
    # n == m is a symbol under torch.compile with lengths that differ, and SDPA wants a bool
    causal = call.pattern == "causal_self" if square else False
    out = attend_chosen(q, k, v, gates != 0, mask=mask, causal=causal)
    return (out * gates[..., None]).to(v.dtype), state, {"gates": gates, **aux}


def highest(score: Tensor, count: int) -> Tensor:
    """1 at the `count` highest of score [..., E], ties to the lower index, else 0."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score).scatter(-1, order, 1.0)


def norm_gates(q: Q, cfg: Config) -> tuple[Tensor, dict]:
    """([B, H, N] of 0 and 1, {})"""
    shared, chosen = counts(cfg, q.shape[1])
    norms = at_least_float32(q.detach()).norm(dim=-1).mT  # [B, N, H]
    on = highest(norms[..., shared:], chosen)
    return torch.cat([torch.ones_like(norms[..., :shared]), on], -1).mT, {}


def learned_gates(q: Q, cfg: Config, call: Call) -> tuple[Tensor, dict]:
    """([B, H, N], {"balance": its loss})"""
    shared, chosen = counts(cfg, q.shape[1])
    x = call.x_of_queries
    x, aux = at_least_float32(x[:, x.shape[1] - q.shape[2] :]), {}
    routers = {name: linear(x, w.to(x.dtype)).softmax(-1) for name, w in call.params.items()}
    kinds = 2 * routers["kinds"] if "kinds" in routers else x.new_ones(2)
    parts = [kinds[..., :1] * shared * routers["shared"]] if shared else []
    if chosen:
        shares = routers["routed"]
        on = highest(shares.detach(), chosen)
        kept = shares * on
        parts.append(kinds[..., 1:] * chosen * kept / kept.sum(-1, keepdim=True))
        aux["balance"] = balance(shares, on, call)
    return torch.cat(parts, -1).mT, aux


def balance(shares: Tensor, on: Tensor, call: Call) -> Tensor:
    """The loss from shares and choices [B, N, E], padding left out."""
    if call.key_mask is not None and not call.cross:
        real = call.key_mask.any(1)[:, -shares.shape[1] :].expand(shares.shape[:2])
        shares, on = (t.masked_fill(~real[..., None], 0) for t in (shares, on))
        tokens = real.sum().clamp(min=1)
    else:
        tokens = shares.shape[0] * shares.shape[1]
    return shares.shape[2] * ((shares.sum((0, 1)) / tokens) * (on.sum((0, 1)) / tokens)).sum()


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    pair_masks=True,
    needs_x=lambda cfg: cfg.router == "learned",
    test_settings=(
        {"active": 0.5, "shared": 0.0},
        {"active": 0.5, "shared": 0.0, "router": "norms"},
        {"shared": 1.0, "active": 1.0},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    exempt={"heads_alone": "heads are chosen, and weighed, beside each other"},
    card=Card(
        title="Mixture-of-head attention (MoH)",
        paper="MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv:2410.11842",
        year=2024,
        idea="heads as experts: a token's router weighs the shared heads and chooses among the others",
        cost="that of softmax attention over a prompt; a step of one token reads the KV heads that it chose",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv", "x"),
        lineage=("softmax",),
        neutral={"active": 1.0, "router": "norms"},
        caveat=(
            "the released code for images and DiT is followed in the renormalisation of the chosen gates; its "
            "shares are set layer by layer, here by one pair of numbers. For LLaMA it has the router without "
            "parameters (norms before rotary positions, which keep them; half of the heads shared, a quarter routed): "
            "its gates of 0 and 1 pass no gradient to the queries; a straight-through estimate is left to a trainer. "
            "`balance` is over the tokens of the call; add it to the loss yourself, times 0.01"
        ),
    ),
)
