"""Linear attention: softmax's exponential of a product becomes a product of positive features, and sums can be shared.

    S_t = S_{t-1} + φ(k_t)ᵀ v_t           z_t = z_{t-1} + φ(k_t)
    o_t = φ(q_t) S_t / (φ(q_t) z_t)       φ(x) = elu(x) + 1

so a token costs the same wherever it stands, and generation needs S [D, E] and z [D] only. Without causality every
query reads the sums over all keys. There is no scale: the published φ is applied to queries and keys as they are.

Worked by hand: query 0 has φ = 1; keys 0 and 2 have φ = 1 and 3; values 4 and 8: (1·4 + 3·8) / (1 + 3) = 7.

>>> import torch
>>> q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, -1, 1) for x in ([0.0], [0.0, 2.0], [4.0, 8.0]))
>>> round(reference(q, k, v, Config(), Call("cross"))[0].item(), 4)
7.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, elu_plus_one, exact, heads_of, initial, quotient, recurrence, rounded


@dataclass(frozen=True)
class Config:
    eps: float = 1e-6  # added to the denominator, as in the released code
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))

    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def write(state: tuple, t: int) -> tuple:
        s, z = state
        return s + phi(k_h[:, :, t, :, None]) * v_h[:, :, t, None], z + phi(k_h[:, :, t])

    def read(state: tuple, i: int) -> Tensor:
        s, z = state
        query = phi(q_h[:, :, i])
        return quotient(torch.einsum("bhd,bhde->bhe", query, s), (query * z).sum(-1, keepdim=True) + cfg.eps)

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3] + 1)
    out, end = recurrence((s[..., :-1], s[..., -1]), write, read, n, m, call)
    return rounded(out, None if end is None else torch.cat([end[0], end[1][..., None]], -1), v)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    return Form(elu_plus_one(q), elu_plus_one(k), v, normalise=True, eps=cfg.eps, state=call.initial_state)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * (dims["value"] + 1),
    exempt={"neutral": "no setting turns it into softmax attention"},
    card=Card(
        title="Linear attention (elu + 1)",
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (ICML 2020)",
        year=2020,
        idea="weights are products of positive features, so one sum over the keys serves every query",
        cost="O((N + M)·D·E) time",
        state="D·(E + 1) numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("softmax",),
        caveat="the released kernel adds eps to the denominator, as here, so weights sum to slightly less than one",
    ),
)
