"""State space duality, the mixer of Mamba-2: linear attention whose state decays by a learned step per token.

    S_t = e^{dt_t A_h} S_{t-1} + dt_t k_tᵀ v_t      a [D, E] state per head; k is the paper's B, v its x, q its C
    y_t = q_t S_t + D_h v_t
    dt_t = softplus(x_t W_dt + bias),  A_h = -exp(A_log_h)

A token with a large step forgets more of the past and writes more of itself. The same numbers are those of an
attention without softmax whose weights are q_t·k_s dt_s e^{A (dt_{s+1} + ... + dt_t)}: this is the duality.

self reads in both directions, the own token once; cross reads the state that the whole memory has left, without a
skip, as a query has no value of its own there.

Worked by hand: dt = 1, A = -1, D = 1 and ones for q, k and v: S = 1, then e⁻¹ + 1; the outputs are one more.

>>> import math, torch
>>> one = torch.ones(1, 1, 2, 1, dtype=torch.float64)
>>> params = {"w_dt": torch.zeros(1, 1), "dt_bias": torch.tensor([math.log(math.e - 1)])}
>>> params |= {"a_log": torch.zeros(1), "d": torch.ones(1)}
>>> out, _ = reference(one, one, one, Config(), Call(params=params, x=one[0]))
>>> [round(y, 4) for y in out.flatten().tolist()]
[2.0, 2.3679]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, exact, heads_of, initial, per_query_head, recurrence, rounded
from regard.ops.ssm import adds_skip, check_ranges, initial_steps, step_sizes


@dataclass(frozen=True)
class Config:
    dt_min: float = 0.001  # dt and -A lie in these ranges at the start of training
    dt_max: float = 0.1  # the largest dt at the start of training; a larger step forgets and writes more
    a_min: float = 1.0  # the smallest -A at the start of training
    a_max: float = 16.0  # the largest -A at the start of training; heads with larger ones forget faster
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        check_ranges(self.dt_min, self.dt_max, self.a_min, self.a_max)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    return initial_steps(dims["heads"], dims["width"], (cfg.dt_min, cfg.dt_max), (cfg.a_min, cfg.a_max))


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    params = (call.params[name] for name in ("w_dt", "dt_bias", "a_log", "d"))
    x, w_dt, dt_bias, a_log, d = exact(call.x_of_keys, *params)
    a = -a_log.exp()
    z = torch.einsum("bmc,ch->bhm", x, w_dt) + dt_bias[:, None]
    # softplus
    dt = torch.logaddexp(z, torch.zeros_like(z))
    # a hidden token passes nothing on to itself
    skipped = v_h if call.key_mask is None else v_h.masked_fill(~call.key_mask[..., None], 0)

    def write(s: Tensor, t: int) -> Tensor:
        keep = (dt[:, :, t] * a).exp()
        new = k_h[:, :, t, :, None] * v_h[:, :, t, None]
        return keep[..., None, None] * s + dt[:, :, t, None, None] * new

    def read(s: Tensor, i: int) -> Tensor:
        y = torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)
        return y if call.cross else y + d[:, None] * skipped[:, :, m - n + i]

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3])
    return rounded(*recurrence(s, write, read, n, m, call, two_sided=True), v)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    dt = step_sizes(call)
    values = dt[..., None] * per_query_head(v, q.shape[1])
    decay = -dt * call.params["a_log"].to(dt.dtype).exp()[:, None]
    return Form(q, k, values, decay, state=call.initial_state, finish=adds_skip(v, call))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    needs_x=True,
    needs_norm=True,
    order_aware=True,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    exempt={"neutral": "its decays and steps are learned: no setting turns it into a fixed attention"},
    card=Card(
        title="State space duality (Mamba-2)",
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality",
        year=2024,
        idea="one learned step per token both decays the shared state and scales what the token writes to it",
        cost="O((N + M)·D·E + N·chunk·(D + E)) time",
        state="D·E numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("linear_attention",),
        caveat="the short convolution and SiLU before it and the gate and norm after it belong to the layer; the "
        "forms for self and cross are not the paper's, which is causal only",
    ),
)
