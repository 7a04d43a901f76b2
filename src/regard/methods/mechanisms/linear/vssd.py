"""VSSD: state space duality for images, without causality: one state that all tokens write and all tokens read.

    S   = Σ_j m_j k_jᵀ v_j         m_j = dt_j exp(A_log_h), dt_j = softplus(x_j W_dt + bias)
    y_i = q_i S + D_h v_i          k is the paper's B, v its x, q its C

In causal duality e^{dt A} says how much of the past a token keeps, which depends on the order of scanning. Here the
step only says how much the token itself counts, so no order is left: permute the tokens and the outputs permute.

causal_self sums the tokens up to the query's own with the same weights, which have no decay; cross reads the state of
the memory, without a skip.

Worked by hand: dt = 1 and exp(A_log) = 2 weigh values 1 and 3 by 2 each: S = 8, and with D = 1 the outputs are 9, 11.

>>> import math, torch
>>> one, v = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
>>> params = {"w_dt": torch.zeros(1, 1), "dt_bias": torch.tensor([math.log(math.e - 1)])}
>>> params |= {"a_log": torch.tensor([math.log(2)]), "d": torch.ones(1)}
>>> out, _ = reference(one, one, v, Config(), Call("self", params=params, x=one[0]))
>>> [round(y, 4) for y in out.flatten().tolist()]
[9.0, 11.0]
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
    dt_min: float = 0.001  # dt and exp(A_log) lie in these ranges at the start of training
    dt_max: float = 0.1  # the largest dt at the start of training; a token with a larger step counts more
    a_min: float = 1.0  # the smallest exp(A_log) at the start of training
    a_max: float = 16.0  # the largest exp(A_log) at the start of training
    chunk: int = 64  # of the causal form; changes the speed, never the result

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
    z = torch.einsum("bmc,ch->bhm", x, w_dt) + dt_bias[:, None]
    # softplus(z) exp(A_log)
    weight = torch.logaddexp(z, torch.zeros_like(z)) * a_log.exp()[:, None]
    # a hidden token passes nothing on to itself
    skipped = v_h if call.key_mask is None else v_h.masked_fill(~call.key_mask[..., None], 0)

    def write(s: Tensor, t: int) -> Tensor:
        return s + weight[:, :, t, None, None] * k_h[:, :, t, :, None] * v_h[:, :, t, None]

    def read(s: Tensor, i: int) -> Tensor:
        y = torch.einsum("bhd,bhde->bhe", q_h[:, :, i], s)
        return y if call.cross else y + d[:, None] * skipped[:, :, m - n + i]

    s = initial(call, q, len(q), heads, k.shape[3], v.shape[3])
    return rounded(*recurrence(s, write, read, n, m, call), v)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    dt = step_sizes(call)
    weight = dt * call.params["a_log"].to(dt.dtype).exp()[:, None]
    values = weight[..., None] * per_query_head(v, q.shape[1])
    return Form(q, k, values, state=call.initial_state, finish=adds_skip(v, call))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    needs_x=True,
    needs_norm=True,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    exempt={"neutral": "its weights are learned: no setting turns it into a fixed attention"},
    card=Card(
        title="VSSD: non-causal state space duality",
        paper="VSSD: Vision Mamba with Non-Causal State Space Duality",
        year=2024,
        idea="a token's step weighs only its own share of one state that every token reads, so order plays no part",
        cost="O((N + M)·D·E) time",
        state="D·E numbers per head, whatever the length",
        needs=("vit", "qkv"),
        lineage=("ssd", "linear_attention"),
        caveat=(
            "in the released code the weight dt·A is negative unless its flag ssd_positve_dA flips the sign, as all "
            "its settings do and as here; the depthwise convolution and SiLU before it and "
            "norm(y)·z after it belong to the layer, and only without that convolution do outputs permute with the "
            "tokens; causal_self is not the paper's"
        ),
    ),
)
