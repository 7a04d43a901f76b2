"""RCMHA: a short depth-wise convolution on queries, keys and values, and scores that know distances, not places.

    q', k', v' = conv(q), conv(k), conv(v)             conv(t)_i = Σ_s w_s ⊙ t_{i-s} + b,   s = 0 .. kernel - 1
    s_ij = ((q'_i + u)·k'_j + (q'_i + t)·W_r r_{i-j}) · scale
    o_i  = Σ_j softmax_j(s_ij) v'_j

where r_d = (sin ω_f d, cos ω_f d) with ω_f = 10000^(-f/F) for f < F = ⌈HD/2⌉ (Transformer-XL), u, t [D] and W_r
[D, 2F] are learned for each head, and scale is 1/√D. The convolution is causal, its weights one for each channel and
the same for all heads. A text that is moved along keeps its scores, so no positions are added to the tokens, and the
convolution gives pairs and triples of tokens before the first layer has learned to look for them.

A hidden token is as if it were not there: the convolution passes over it, and distances are counted in tokens that are.

Worked by hand: one channel, scale 1, kernel 2 with w = (1, 2) and no bias on the values, and nothing else: values 1
and 4 become 1 and 4 + 2 = 6, all scores are 0, so the outputs are 1 and 7/2. With t = 1 and W_r = (0, log 3/(cos 1 -
1)) the key at distance 1 weighs 3 against 1: 3/4 + 6/4 = 9/4.

>>> import math, torch
>>> x, zeros, ones = torch.tensor([1.0, 4.0]).view(1, 1, 2, 1), torch.zeros(1, 1), torch.ones(1, 1)
>>> params = {"q_conv": torch.zeros(1, 2), "k_conv": torch.zeros(1, 2), "v_conv": torch.tensor([[1.0, 2.0]])}
>>> params |= {"q_bias": zeros[0], "k_bias": zeros[0], "v_bias": zeros[0], "u": zeros, "t": ones}
>>> params["w_r"] = torch.tensor([0.0, 0.0]).view(1, 1, 2)
>>> reference(x, x, x, Config(kernel=2), Call(params=params))[0].flatten()
tensor([1.0000, 3.5000])
>>> params["w_r"] = torch.tensor([0.0, math.log(3) / (math.cos(1) - 1)]).view(1, 1, 2)
>>> reference(x, x, x, Config(kernel=2), Call(params=params))[0].flatten()
tensor([1.0000, 2.2500])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, Unsupported, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    Distances,
    closed_up,
    heads_of,
    masked_softmax,
    mix,
    quotient,
    row_blocks,
    scores,
    short_convolution,
    shown,
    visible,
)

NO_DISTANCE = "a key of another text has no distance from a query"
OWN_TEXT = (
    "the convolution reads earlier queries: as many queries as new keys, and a state for what was before"
)


@dataclass(frozen=True)
class Config:
    kernel: int = 3  # tokens of the convolution; 0: none
    relative: bool = True  # whether distances score; without it only content does

    def __post_init__(self) -> None:
        require(self.kernel >= 0, "kernel >= 0", kernel=self.kernel)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, key, params = dims["heads"], dims["key"], {}
    if cfg.kernel:
        for letter, width in (("q", key), ("k", key), ("v", dims["value"])):
            # conv[:, s] weighs the token s places back
            params[f"{letter}_conv"] = torch.empty(width, cfg.kernel).uniform_(-1, 1) * cfg.kernel**-0.5
            params[f"{letter}_bias"] = torch.empty(width).uniform_(-1, 1) * cfg.kernel**-0.5
    if cfg.relative:
        waves = 2 * -(-heads * key // 2)
        params |= {"u": torch.zeros(heads, key), "t": torch.zeros(heads, key)}
        params["w_r"] = torch.empty(heads, key, waves).uniform_(-1, 1) * waves**-0.5
    return params


def beginning(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[tuple[Tensor, ...], ...]:
    """(q, k, v), keys and values so far, the last inputs of the convolutions of q, k and v.

    Keys have the heads of the mask where it differs by head, or those that the state has.
    """
    if q.shape[2] != k.shape[2]:
        raise Unsupported(OWN_TEXT)
    old = call.initial_state
    if old is None:
        tails = (x.new_zeros(*x.shape[:2], max(cfg.kernel - 1, 0), x.shape[3]) for x in (q, k, v))
        old = (k[:, :, :0], v[:, :, :0], *tails)
    by_head = call.key_mask is not None and call.key_mask.shape[1] > 1
    groups = q.shape[1] if by_head else old[0].shape[1]
    of_keys = (x if x.shape[1] == groups else heads_of(x, groups) for x in (k, v, *old[:2], *old[3:]))
    k, v, old_k, old_v, k_tail, v_tail = of_keys
    return (q, k, v), (old_k, old_v), (old[2], k_tail, v_tail)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    tokens, (old_k, old_v), tails = beginning(q, k, v, cfg, call)
    heads, n, m = q.shape[1], q.shape[2], old_k.shape[2] + k.shape[2]
    there = torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    p = {name: x.double() for name, x in call.params.items()}
    new, ends = [], []
    for letter, t, tail in zip("qkv", tokens, tails, strict=True):
        out, end = t.double(), tail.double()
        if cfg.kernel:
            out, end = token_by_token(out, end, p[f"{letter}_conv"], p[f"{letter}_bias"], there[..., m - n :])
        # a hidden token neither asks nor answers
        new.append(torch.where(there[..., m - n :, None], out, 0.0))
        ends.append(end.to(t.dtype))
    q_h, k_all, v_all = new[0], torch.cat([old_k, new[1]], dim=2), torch.cat([old_v, new[2]], dim=2)
    k_h, v_h = heads_of(k_all, heads), heads_of(v_all, heads)
    s = torch.einsum("bhnd,bhmd->bhnm", q_h + p["u"][:, None] if cfg.relative else q_h, k_h)
    if cfg.relative:
        place = (there.long().cumsum(-1) - 1).clamp(min=0)
        far = place[..., m - n :, None] - place[..., None, :]
        r = torch.stack([waves_at(d, p["w_r"]) for d in range(1 - m, m)])  # [2M - 1, 2F]
        learned = torch.einsum("hdf,bhnmf->bhnmd", p["w_r"], r[(far + m - 1).expand(len(q), heads, -1, -1)])
        s = s + torch.einsum("bhnd,bhnmd->bhnm", q_h + p["t"][:, None], learned)
    sees = there[:, :, None].expand(-1, -1, n, -1)
    sees = sees.tril(m - n) if call.pattern == "causal_self" else sees
    s = (s * q.shape[3] ** -0.5).masked_fill(~sees, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    state = (k_all.to(k.dtype), v_all.to(v.dtype), *ends) if call.pattern == "causal_self" else None
    return quotient(e @ v_h, e.sum(-1, keepdim=True)).to(v.dtype), state


def token_by_token(t: Tensor, past: Tensor, w: Tensor, bias: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution, and the last inputs of it; of the reference only."""
    rows = []
    for i, token in enumerate(t.unbind(2)):
        line = torch.cat([past, token[:, :, None]], dim=2)
        rows.append(sum(w[:, s] * line[:, :, w.shape[1] - 1 - s] for s in range(w.shape[1])) + bias)
        past = torch.where(there[..., i, None, None], line[:, :, 1:], past)
    return torch.stack(rows, dim=2), past


def waves_at(distance: int, w_r: Tensor) -> Tensor:
    """r_d [2F]; of the reference only."""
    count = w_r.shape[2] // 2
    angles = [distance * 10_000 ** (-f / count) for f in range(count)]
    return w_r.new_tensor([*map(math.sin, angles), *map(math.cos, angles)])


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    tokens, (old_k, old_v), tails = beginning(q, k, v, cfg, call)
    n, m, mask = q.shape[2], old_k.shape[2] + k.shape[2], call.key_mask
    if cfg.kernel:
        order = None if mask is None else closed_up(mask[..., m - n :])
        learned = ((call.params[f"{letter}_conv"], call.params[f"{letter}_bias"]) for letter in "qkv")
        mixed = [short_convolution(x, t, *p, order) for x, t, p in zip(tokens, tails, learned, strict=True)]
        tokens, tails = zip(*mixed, strict=True)
    q = tokens[0] if mask is None else shown(tokens[0], mask[..., m - n :])
    k, v = (shown(torch.cat([old, x], 2), mask) for old, x in zip((old_k, old_v), tokens[1:], strict=True))
    state = (k, v, *tails) if call.pattern == "causal_self" else None
    scale, seen = q.shape[3] ** -0.5, visible(call, n, m, q.device)
    asks, distances = q, None
    if cfg.relative:
        u, t = (call.params[name].to(q.dtype)[:, None] for name in "ut")
        asks, distances = q + u, Distances(q + t, call.params["w_r"], call, scale=scale, keys=m)
    parts = []
    for rows in row_blocks(n, q.shape[0] * q.shape[1] * m):
        upto = m - n + rows.stop if call.pattern == "causal_self" else m
        s = scores(asks[:, :, rows], k[:, :, :upto], scale)
        s = s if distances is None else s + distances.scores(rows, upto)
        cut = None if seen is None else (seen[..., rows, :] if seen.shape[-2] > 1 else seen)[..., :upto]
        parts.append(mix(masked_softmax(s, cut), v[:, :, :upto]))
    return torch.cat(parts, dim=2) if len(parts) != 1 else parts[0], state


def state_size(cfg: Config, dims: dict, n: int) -> int:
    back = max(cfg.kernel - 1, 0)
    return dims["kv_heads"] * (n + back) * (dims["key"] + dims["value"]) + dims["heads"] * back * dims["key"]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    order_aware=True,
    patterns=("self", "causal_self"),
    unsupported={"cross": NO_DISTANCE, "causal_cross": NO_DISTANCE},
    test_settings=({"kernel": 1}, {"kernel": 4}, {"kernel": 0}, {"relative": False}),
    state_size=state_size,
    exempt={"queries": "its convolution carries them on", "heads_alone": "as many waves as channels"},
    card=Card(
        title="RCMHA: relative convolutional multi-head attention",
        paper="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling, arXiv:2308.03429",
        year=2023,
        idea="a short causal convolution on queries, keys and values; scores by content and by distance",
        cost="O(N·M·D) time for content and as much for distances, in blocks of rows",
        state="convolved keys and values so far, and the last kernel - 1 inputs of the three convolutions",
        needs=("qkv",),
        lineage=("softmax",),
        neutral={"kernel": 0, "relative": False},
        caveat=(
            "kernel and relative give the paper's four sides: (0, False) plain attention, (3, False) MDHA, (0, True) "
            "Transformer-XL's, (3, True) RCMHA. The released code learns a vector and a number for each distance (8192 "
            "each) in place of W_r r and t; its queries before a segment are zeros, where a state carries them here. "
            "What the abstract says of memory contradicts itself. A mask of pairs is refused, since the convolution "
            "would carry what it hides"
        ),
    ),
)
