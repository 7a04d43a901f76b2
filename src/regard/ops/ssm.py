"""What pages of selective state spaces share: a step size per token and head, its initial range, and the skip.

    dt_t = softplus(x_t W_dt + bias)      [B, H, M] from the layer's input x [B, M, C]
    A    = -exp(A_log)                    [H], so a step of dt decays by e^{dt A}
    y_t += D_h v_t                        what a token passes on to itself

params: w_dt [C, H], dt_bias [H], a_log [H], d [H].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.call import Call
from regard.core.errors import require
from regard.ops.linear import shown
from regard.ops.softmax import at_least_float32, per_query_head

FLOOR = 1e-4  # of an initial step size


def initial_steps(
    heads: int, width: int, dt: tuple[float, float] = (0.001, 0.1), a: tuple[float, float] = (1.0, 16.0)
) -> dict[str, Tensor]:
    """Mamba-2's initial values: dt log-uniform in its range at x = 0, -A uniform in its range, D = 1."""
    low, high = (math.log(edge) for edge in dt)
    step = (low + torch.rand(heads) * (high - low)).exp().clamp(min=FLOOR)
    return {
        "w_dt": torch.empty(width, heads).uniform_(-1, 1) * width**-0.5,
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus backwards
        "a_log": torch.empty(heads).uniform_(*a).log(),
        "d": torch.ones(heads),
    }


def step_sizes(call: Call) -> Tensor:
    """dt [B, H, M] of the keys, float32 at least.

    >>> params = {"w_dt": torch.zeros(3, 1), "dt_bias": torch.tensor([math.log(math.e - 1)])}
    >>> step_sizes(Call(params=params, x=torch.ones(1, 2, 3)))
    tensor([[[1., 1.]]])
    """
    x = at_least_float32(call.x_of_keys)
    # laid out before the softplus, whose gradient torch.compile and torch lay out differently after a transposition
    return F.softplus(
        (x @ call.params["w_dt"].to(x.dtype) + call.params["dt_bias"].to(x.dtype)).mT.contiguous()
    )


def check_ranges(dt_min: float, dt_max: float, a_min: float, a_max: float) -> None:
    """The settings of initial_steps."""
    require(0 < dt_min <= dt_max, "0 < dt_min <= dt_max", dt_min=dt_min, dt_max=dt_max)
    require(0 < a_min <= a_max, "0 < a_min <= a_max", a_min=a_min, a_max=a_max)


def with_skip(y: Tensor, v: Tensor, call: Call) -> Tensor:
    """y + D_h v_t at every query of a text that asks itself, y alone in cross: [B, H, N, E] in v's dtype.

    Hidden tokens add nothing.
    """
    if call.cross:
        return y.to(v.dtype)
    heads, queries = y.shape[1:3]
    skipped = at_least_float32(per_query_head(v, heads)).expand(-1, heads, -1, -1)
    skipped = shown(skipped, call.key_mask)[:, :, v.shape[2] - queries :].to(y.dtype)
    return torch.addcmul(y, call.params["d"].to(y.dtype).view(-1, 1, 1), skipped).to(v.dtype)


def adds_skip(v: Tensor, call: Call) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """What a Form finishes with: the skip added to its outputs, the state as it is."""
    return lambda y, state: (with_skip(y, v, call), state)
