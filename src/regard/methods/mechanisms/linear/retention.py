"""Retention: linear attention whose state rotates and fades at a fixed rate, a different one for every head.

    S_t = γ_h Θ S_{t-1} + k_tᵀ v_t / √D        Θ rotates channels 2c and 2c + 1 by the angle θ_c
    o_t = q_t S_t,    that is    o_t = Σ_{s<=t} γ^(t-s) q_t Θ^(t-s) k_sᵀ v_s / √D
    γ_h = 1 - 2^(-5-h)                         head h counted from 0
    θ_c = 10000^(-c / (D/2 - 1))               c = 0 .. D/2 - 1, from 1 down to 1/10000

There is no denominator: a group norm per head follows, so scales do not matter. The state stands in the frame of its
last token, so that it carries on without a count of the tokens before: Θ moves with every token that is there, hidden
ones excepted. In self a token weighs by its distance on both sides; in cross and causal_cross every query reads the
state that the whole memory has left, standing where its last token stands.

Worked by hand: head 0 has γ = 31/32. With D = 2 and θ = 1, q = k = (1, 0) one step apart give γ cos(1) / √2.

>>> q = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
>>> v = torch.tensor([[[[1.0], [0.0]]]])
>>> round(reference(q, q, v, Config(), Call())[0][0, 0, 1].item(), 6)  # 31/32 · 0.540302 / 1.414214
0.370112
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, exact, heads_of, initial, per_query_head, recurrence, rounded


@dataclass(frozen=True)
class Config:
    turns: bool = True  # the rotation Θ; False where the layer has rotated q and k already
    slowest: float = 10000.0  # 1 / the angle of the last pair of channels
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.slowest >= 1, "slowest >= 1", slowest=self.slowest)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def theta_matrix(width: int, cfg: Config) -> Tensor:
    """[D, D] Θ, for the reference: (a, b) of channels 2c and 2c + 1 becomes (a cos - b sin, a sin + b cos) of θ_c."""
    theta = torch.eye(width, dtype=torch.float64)
    if cfg.turns:
        require(width % 2 == 0, "the key width is even, as channels turn in pairs", key=width)
        for c in range(width // 2):
            angle = torch.tensor(cfg.slowest ** (-c / max(width // 2 - 1, 1)), dtype=torch.float64)
            theta[2 * c, 2 * c] = theta[2 * c + 1, 2 * c + 1] = angle.cos()
            theta[2 * c, 2 * c + 1], theta[2 * c + 1, 2 * c] = angle.sin(), -angle.sin()
    return theta


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads, width = q.shape[2], k.shape[2], q.shape[1], k.shape[3]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=torch.float64, device=q.device)
    gamma, theta = gamma.view(-1, 1, 1), theta_matrix(width, cfg).to(q.device)

    def kv(t: int) -> Tensor:
        return k_h[:, :, t, :, None] * v_h[:, :, t, None] / width**0.5

    def write(s: Tensor, t: int) -> Tensor:
        return gamma * (theta @ s) + kv(t)

    def read(s: Tensor, i: int) -> Tensor:
        return torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)

    s = initial(call, q, len(q), heads, width, v.shape[3])
    if call.pattern != "self":
        return rounded(*recurrence(s, write, read, n, m, call), v)
    out, _ = recurrence(s, write, read, n, m, call.with_(pattern="causal_self"))
    return rounded(out + later(s, kv, read, gamma, theta, n, call), None, v)


def later(
    s: Tensor, kv: Callable, read: Callable, gamma: Tensor, theta: Tensor, n: int, call: Call
) -> Tensor:
    """[B, H, N, E] Σ_{s>t} γ^(s-t) q_t Θ^(t-s) k_sᵀ v_s / √D, for the reference: from the last token on, by Θ⁻¹."""
    key_mask = (
        torch.ones(1, 1, n, dtype=torch.bool, device=s.device) if call.key_mask is None else call.key_mask
    )
    rows = []
    for t in reversed(range(n)):
        back, here = theta.mT @ s, key_mask[:, :, t, None, None]
        # what is hidden itself looks ahead from the token before it, and does not fade what it sees
        back = torch.where(here, gamma * back, back)
        rows.append(read(back, t))
        s = torch.where(here, back + kv(t), s)
    return torch.stack(rows[::-1], dim=2)


def rotated(t: Tensor, position: Tensor, cfg: Config) -> Tensor:
    """Channels 2c and 2c + 1 of t [B, H, n, D] rotated by position [B|1, H|1, n] times the angle θ_c."""
    pairs = t.shape[-1] // 2
    c = torch.arange(pairs, device=t.device).double() / max(pairs - 1, 1)
    # in float32 an angle of 100,000 is off by 0.004
    angle = position[..., None].double() * cfg.slowest**-c  # [B|1, H|1, n, D/2]
    cos, sin = angle.cos().to(t.dtype), angle.sin().to(t.dtype)
    even, odd = t[..., 0::2], t[..., 1::2]
    both = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(both, dim=-1).flatten(-2)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    """Queries and keys rotated by their positions; the state comes and goes in the frame of its last token."""
    dtype, (n, m) = v.dtype, (q.shape[2], k.shape[2])
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    k = k * k.shape[-1] ** -0.5
    decay = torch.log1p(-(2 ** (-5 - torch.arange(q.shape[1], device=q.device).to(q.dtype))))
    if not cfg.turns:
        return Form(q, k, v, decay, state=call.initial_state, finish=lambda out, end: (out.to(dtype), end))
    require(q.shape[-1] % 2 == 0, "the key width is even, as channels turn in pairs", key=q.shape[-1])
    key_mask = (
        torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    )
    position = key_mask.cumsum(-1).to(q.dtype)  # [B|1, H|1, M], from 1; the incoming state stands at 0
    last = position[..., -1:]

    def finish(out: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return out.to(dtype), None if end is None else rotated(end.mT, -last, cfg).mT

    k = rotated(per_query_head(k, q.shape[1]), position, cfg)
    q = rotated(q, last if call.cross else position[..., m - n :], cfg)
    return Form(q, k, v, decay, state=call.initial_state, finish=finish)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    order_aware=True,
    patterns=PATTERNS,
    needs_norm=True,
    speed_settings=("chunk",),
    test_settings=({"turns": False}, {"slowest": 3.0}),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    exempt={
        "neutral": "every head forgets: no setting has γ = 1, and none has softmax's denominator",
        "heads_alone": "a head's decay follows from its number",
    },
    card=Card(
        title="Retention (RetNet)",
        paper="Retentive Network: A Successor to Transformer for Large Language Models (2023)",
        year=2023,
        idea="a rotation and a fixed decay per head make attention a recurrence, equal in parallel and in chunks",
        cost="O((N + M)·(C·D + D·E)) time for chunks of C tokens",
        state="D·E numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("linear_attention",),
        caveat=(
            "of the paper's three normalisations of scores only 1/√D is here: the group norm that follows takes out "
            "those by row sums of the decay and of |q k|, but for its eps. That norm and the gate are the layer's"
        ),
    ),
)
