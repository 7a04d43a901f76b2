"""LightNet's claim: additive recurrence does not know the order of tokens, decay does; its causal forms agree.

Keys of a few units are compared in float32. Keys of some fifty send the fast path through its gates; in float32 they
are known to 4e-6 only and their exponentials no better (all forms are then 7e-5 from the exact sum), so in float64.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from regard.claims.lab import difference, generator, median_times, random_qkv, slope, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import lightnet as page
from regard.ops import linear

WIDTH, SHORT, LONG = 16, 2_048, 16_384


def drawn(n: int, dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) for t in random_qkv(generator(), heads, n, WIDTH, dtype=torch.float64))


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Row t from the softmax over the first t keys of each channel, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    rows = [
        silu(q[:, :, t, None]) @ (k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1])
        for t in range(q.shape[2])
    ]
    return torch.cat(rows, dim=2)


def reordering() -> dict[str, float]:
    """How far the outputs of permuted tokens are from the permuted outputs: LightNet, and decay 0.9 both ways.

    And how far LightNet is from its features under a decay of 1.
    """
    q, k, v = drawn(256)
    order = torch.randperm(256, generator=generator(1))
    sides: dict[str, Callable[..., Tensor]] = {
        "additive": lambda *qkv: page.METHOD.fast(*qkv, page.Config(), Call("self"))[0],
        "decay": partial(decayed, 0.9),
    }
    moved = [t[:, :, order] for t in (q, k, v)]
    change = {name: difference(side(*moved), side(q, k, v)[:, :, order]) for name, side in sides.items()}
    return change | {"decay_of_1_against_page": difference(decayed(1.0, q, k, v), sides["additive"](q, k, v))}


def decayed(decay: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LightNet's own features, summed with a decay."""
    parts = page.form(q, k, v, page.Config(), Call("self"))
    log_decay = torch.full((q.shape[1],), math.log(decay))
    return linear(parts.q, parts.k, parts.v, log_decay, pattern="self")[0]


def exponent(pattern: str, repeats: int = 15) -> float:
    inputs = {n: drawn(n, heads=4) for n in (SHORT, LONG)}

    def mix(n: int) -> None:
        page.METHOD.fast(*inputs[n], page.Config(), Call(pattern))

    times = median_times({n: partial(mix, n) for n in inputs}, repeats)
    return slope(list(times), list(times.values()))


def measure() -> Measured:
    change, apart = reordering(), {}
    for case, wide, dtype in (("near_keys", 1.0, torch.float32), ("far_keys", 15.0, torch.float64)):
        q, k, v = drawn(300, dtype)
        wanted = cumulative(q, wide * k, v)
        for form, path in (("recurrent", page.METHOD.reference), ("chunked", page.METHOD.fast)):
            apart[f"{form}_{case}"] = difference(path(q, wide * k, v, page.Config(), Call())[0], wanted)
    with threads(1), torch.no_grad():
        grown = {pattern: exponent(pattern) for pattern in ("self", "causal_self")}
    parts = {
        "any order": change["additive"] < 1e-5,
        "decay knows the order": change["decay"] > 1e-2 and change["decay_of_1_against_page"] < 1e-5,
        "causal forms": max(apart.values()) < 1e-5,
        "time": max(grown.values()) <= 1.2,
    }
    numbers = {f"reordering_{name}": value for name, value in change.items()}
    numbers |= {f"difference_{name}": value for name, value in apart.items()}
    return Measured.by(parts, numbers | {f"time_exponent_{name}": value for name, value in grown.items()})


CLAIM = Claim(
    name="lightnet",
    statement="LightNet without causality is equivariant to any order of tokens, decay is not; its causal forms agree",
    bound="reordering < 1e-5, with decay 0.9 > 1e-2; causal forms < 1e-5 apart; time exponent 2k to 16k <= 1.2",
    measure=measure,
)
