"""LightNet: additive recurrence. Weights over the tokens are a softmax per key channel, so one scan needs no direction.

    k̃_j = e^{k_j} / Σ_s e^{k_s}            per channel, over all keys, or in causal_self over those up to the query
    o_i = silu(q_i) Σ_j k̃_jᵀ v_j

A decay multiplies what lies far in scan order by less, so an image needs a scan each way; here each token joins the
sum by its own e^{k_j}, and only the sum is divided: tokens may come in any order. Causally it is a gated recurrence,

    z_t = log(e^{z_{t-1}} + e^{k_t})        S_t = e^{z_{t-1} - z_t} S_{t-1} + e^{k_t - z_t}ᵀ v_t        state (S, z)

whose gates open by themselves: after t equal keys each counts 1/t. `form` runs it without gates, on e^{k_j - m} for
one m per channel, where all keys lie within a factor e^SPREAD; where they do not, and in a graph, with them.

Worked by hand: silu(q) = 1 at q = 1.27846; keys 0 and log 3 weigh 1/4 and 3/4, values 4 and 8 give 4, then 7.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.27846] * 2, [0.0, math.log(3)], [4.0, 8.0]))
>>> [round(o, 3) for o in reference(q, k, v, Config(), Call())[0].flatten().tolist()]
[4.0, 7.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, exact, heads_of, per_query_head, recurrence, rounded
from regard.ops.transforms import asks_values

NOTHING = -1e30  # the key of a token that is not there, and z before the first; finite, so that gradients are
SPREAD = 30.0  # keys this far apart still divide in float32: 1 / Σ² stays below e^60


@dataclass(frozen=True)
class Config:
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    heads = q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))

    def write(state: tuple, t: int) -> tuple:
        s, z = state
        opened = torch.logaddexp(z, k_h[:, :, t])
        gate, new = (z - opened).exp(), (k_h[:, :, t] - opened).exp()
        return gate[..., None] * s + new[..., None] * v_h[:, :, t, None], opened

    def read(state: tuple, i: int) -> Tensor:
        return torch.einsum("bhd,bhde->bhe", q_h[:, :, i] * q_h[:, :, i].sigmoid(), state[0])

    zero = q_h.new_zeros(len(q), heads, k.shape[3], v.shape[3]), torch.full_like(k_h[:, :, 0], NOTHING)
    begin = zero if call.initial_state is None else exact(*call.initial_state)
    return rounded(*recurrence(begin, write, read, q.shape[2], k.shape[2], call), v)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    q, v = F.silu(at_least_float32(q)), at_least_float32(v)
    k = at_least_float32(per_query_head(k, q.shape[1])).expand(-1, q.shape[1], -1, -1)
    k = k if call.key_mask is None else k.masked_fill(~call.key_mask[..., None], NOTHING)
    if call.pattern != "causal_self":
        return Form(q, k.softmax(2), v)
    zero = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]), torch.full_like(k[:, :, 0], NOTHING)
    s, z = zero if call.initial_state is None else call.initial_state
    top = torch.maximum(z, k.amax(2)).detach()[:, :, None]  # [B, H, 1, D]
    if not asks_values() or apart(top, z, k, call.key_mask is not None):
        # all that came before is one key z
        every = torch.cat([z[:, :, None], k], dim=2).logcumsumexp(2)
        gates, k, z = every[:, :, :-1] - every[:, :, 1:], (k - every[:, :, 1:]).exp(), every[:, :, -1]
        return Form(q, k, v, gates, state=s, finish=lambda out, s: (out, (s, z)))
    k, before = (k - top).exp(), (z[:, :, None] - top).exp()
    total = k.cumsum(2) + before
    # before the first that is there
    total = total if call.key_mask is None else total.masked_fill(total == 0, 1)
    last = total[:, :, -1]

    def finish(out: Tensor, s: Tensor) -> tuple[Tensor, tuple]:
        return out, (s / last[..., None], top[:, :, 0] + last.log())

    return Form(q / total[:, :, -q.shape[2] :], k, v, state=before.mT * s, finish=finish)


def apart(top: Tensor, z: Tensor, k: Tensor, hidden: bool) -> bool:
    """Whether a key, or the sum before all keys, lies more than SPREAD below the top of its channel."""
    k = k.masked_fill(k == NOTHING, torch.inf) if hidden else k
    least = torch.minimum(k.amin(2), z.masked_fill(z == NOTHING, torch.inf))[:, :, None]
    return bool((top - least > SPREAD).any())


METHOD = Mechanism(
    config=Config, reference=reference, form=form, patterns=PATTERNS, order_aware=True, needs_norm=True,
    speed_settings=("chunk",), exempt={"neutral": "no setting turns it into softmax attention"},
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * (dims["value"] + 1),
    card=Card(
        title="LightNet",
        paper="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet, arXiv:2405.21022",
        year=2024,
        idea="a softmax over the tokens in each key channel replaces decay, so one scan sees an image from everywhere",
        cost="O((N + M)·D·E) time; causally N·D·E·C for keys more than e^30 apart, with chunks of C = 16",
        state="D·(E + 1) numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("linear_attention",),
        caveat="the first author's code is in the repository Doraemonzzz/xmixers: causal only, silu on q as here and "
        "in flash-linear-attention, LRPE on q and k, and sums that begin with e^0, as if a key of 0 without a value "
        "stood before the text, where they begin with nothing here. Output norm and gate belong to the block; the "
        "positions MD-TPE and MD-LRPE, without which the order of tokens is unknown to it, are not on this page",
    ),
)  # fmt: skip
