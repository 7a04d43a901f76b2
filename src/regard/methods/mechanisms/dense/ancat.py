"""Adaptive non-causal attention (ANCAT): each frame decides from itself how far it looks ahead.

    c_id = σ(w_d·x_i + b_d)           d = 1 .. W, for the frames after i; hard: 1 where that is above 1/2, else 0
    m_ij = 1 where j ≤ i;  c_i,j-i where 0 < j - i ≤ W;  0 beyond
    o_i  = Σ_j m_ij e^{s_ij} v_j / Σ_j m_ij e^{s_ij}           s_ij = q_i·k_j / √D

where x is the layer's input. A stream need not wait for the future where it does not help: gates are soft while
training, with a penalty on what they let a model wait for, and hard when it runs. One layer's look-ahead adds to
another's, and a frame that reads a past one waits for what that one waited for; `reach` composes the layers:

    r_i^0 = 0,   r_i^l = max(max_d c_id^l (d + r_{i+d}^{l-1}),  max_{j ≤ i} r_j^{l-1} - (i - j))

in frames, exact for hard gates and a penalty with gradients for soft ones. `aux` has the gates [B, N, W].

Worked by hand: equal keys with values 0 and 4, one gate of 1/2 (w = b = 0): the first frame has 1/2 · 4 / (1 + 1/2).

>>> import torch
>>> params = {"gate": torch.zeros(1, 1), "bias": torch.zeros(1)}
>>> q, v = torch.zeros(1, 1, 2, 1), torch.tensor([0.0, 4.0]).view(1, 1, 2, 1)
>>> reference(q, q, v, Config(ahead=1), Call("self", params=params, x=torch.ones(1, 2, 1)))[0].flatten()
tensor([1.3333, 2.0000])
>>> gates = torch.tensor([[[0.0], [1.0], [0.0], [0.0]]])  # frame 1 of four looks one ahead
>>> reach([gates]).tolist(), reach([gates, gates]).tolist(), reach([gates, gates.roll(1, 1)]).tolist()
([[0.0, 1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, pad

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    carried,
    exact,
    explicit,
    heads_of,
    lower_right,
    quotient,
    softmax_attention,
    visible,
)

AHEAD = "later frames are hidden in a causal pattern, and what it does is to look at some of them"
TWO_TEXTS = "the frames of another stream are not after a query"


@dataclass(frozen=True)
class Config:
    ahead: int = 8  # W, frames that a layer may look ahead; 0: causal
    hard: bool = False  # gates of 0 and 1, as a stream runs

    def __post_init__(self) -> None:
        require(self.ahead >= 0, "ahead >= 0", ahead=self.ahead)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """Gates that stand open, at about 0.9."""
    if not cfg.ahead:
        return {}
    return {"gate": 0.02 * torch.randn(cfg.ahead, dims["width"]), "bias": torch.full((cfg.ahead,), 2.0)}


def reach(gates: Sequence[Tensor]) -> Tensor:
    """[B, N] frames that each output waits for, of gates [B, N, W] of every layer, the first one first."""
    far, n = torch.zeros_like(gates[0][..., 0]), gates[0].shape[1]
    place = torch.arange(n, device=far.device)
    for layer in gates:
        past = (far + place).cummax(1).values - place
        reached = pad(far, (0, layer.shape[2]))
        there = pad(torch.ones_like(far), (0, layer.shape[2]))
        for d in range(1, layer.shape[2] + 1):
            # frames past the end are not waited for
            waits = layer[..., d - 1] * (d + reached[:, d : d + n]) * there[:, d : d + n]
            past = torch.maximum(past, waits)
        far = past
    return far


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict]:
    n = q.shape[2]
    k, v, _ = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * q.shape[3] ** -0.5
    real = torch.ones(1, 1, n, dtype=torch.bool) if call.key_mask is None else call.key_mask
    place = real.long().cumsum(2).expand(len(q), q.shape[1], -1)  # padding is no frame
    later = place[:, :, None] - place[..., None]
    m = (later <= 0).double()
    gates = q_h.new_zeros(len(q), n, cfg.ahead)
    if cfg.ahead:
        gates = torch.sigmoid(
            call.x_of_keys.double() @ call.params["gate"].double().T + call.params["bias"].double()
        )
        gates = (gates > 0.5).double() if cfg.hard else gates
    for d in range(1, cfg.ahead + 1):
        m = m + gates[:, None, :, d - 1, None] * (later == d)
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    s = s.masked_fill(m == 0, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = m * (s - top.masked_fill(top == -torch.inf, 0)).exp()
    return quotient(e @ v_h, e.sum(-1, keepdim=True)).to(v.dtype), None, {"gates": gates}


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None, dict]:
    """Hard gates are a mask for torch's own attention, soft ones a bias of log c."""
    n, scale = q.shape[2], q.shape[3] ** -0.5
    k, v, _ = carried(k, v, call)
    later, seen = distance(call, n, q.device), visible(call, n, n)
    near = later <= cfg.ahead
    near = near if seen is None else near & seen
    if not cfg.ahead:
        gates = at_least_float32(q).new_zeros(len(q), n, 0)
        return softmax_attention(q, k, v, scale=scale, mask=near).to(v.dtype), None, {"gates": gates}
    x = at_least_float32(call.x_of_keys)
    logits = linear(x, *(call.params[p].to(x.dtype) for p in ("gate", "bias")))
    # column 0 is for all that is not later; what is beyond the last is hidden by `near`
    column = later.clamp(0, cfg.ahead).expand(len(q), -1, -1, -1)

    def spread(t: Tensor, present: float) -> Tensor:
        """[B, N, W] -> [B, 1|H, N, N], `present` where keys are not later."""
        return pad(t, (1, 0), value=present)[:, None].expand(-1, column.shape[1], -1, -1).gather(3, column)

    if cfg.hard:
        gates = (logits > 0).to(logits.dtype)
        out = softmax_attention(q, k, v, scale=scale, mask=near & (spread(gates, 1.0) > 0))
    else:
        gates = logits.sigmoid()
        out = explicit(q, k, v, scale=scale, mask=near, bias=spread(logsigmoid(logits), 0.0))
    return out.to(v.dtype), None, {"gates": gates}


def distance(call: Call, n: int, device: torch.device) -> Tensor:
    """[B|1, H|1, N, N]: how many frames key j comes after query i, padding not counted; below 0 before it."""
    if call.key_mask is None:
        place = torch.arange(n, device=device)[None, None]
    else:
        place = call.key_mask.long().cumsum(2)
    return place[:, :, None] - place[..., None]


def causal(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Softmax attention of each frame over itself and what came before: what no look-ahead gives."""
    return explicit(q, k, v, scale=q.shape[3] ** -0.5, mask=lower_right(q.shape[2], k.shape[2]))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    unsupported={"causal_self": AHEAD, "cross": TWO_TEXTS, "causal_cross": TWO_TEXTS},
    pair_masks=True,
    needs_x=lambda cfg: cfg.ahead > 0,
    neutral_base=causal,
    test_settings=({"ahead": 2}, {"ahead": 3, "hard": True}),
    card=Card(
        title="Adaptive non-causal attention (ANCAT)",
        paper=(
            "Lookahead When It Matters: Adaptive Non-causal Transformers for Streaming Neural Transducers, "
            "arXiv:2305.04159"
        ),
        year=2023,
        idea="every frame of a stream decides which of the next frames it waits for",
        cost="that of softmax attention, O(N·C·W) for the gates, and where they are soft N² weights in blocks of rows",
        state="none: an output waits for frames to come",
        needs=("qkv", "x"),
        lineage=("softmax", "window"),
        neutral={"ahead": 0},
        caveat=(
            "a mechanism and not a mask page: the gates are learned and weigh scores. The paper's code is not public "
            "and its formulas were not at hand, only its abstract: that a gate is a sigmoid of one linear map of the "
            "frame, multiplies the exponential of the score (so that 0 is a mask and 1 is nothing), is the same for "
            "all heads, and is hard above 1/2 are choices here, and so is `reach`. With hard gates all but the gates' "
            "choice has gradients. The hard limit with all gates open is softmax with a mask of W frames ahead"
        ),
    ),
)
