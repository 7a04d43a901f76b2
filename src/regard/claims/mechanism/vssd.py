"""VSSD's claim: without causality state space duality has no order of scanning, and still costs linear time.

Both operators get the same tokens and the same learned parts; the tokens are then permuted, and the outputs permuted
back. Δ is the largest difference, relative to the largest output. Lengths are the tokens of images from 28 × 28 to
112 × 112 patches; the exponent is the slope of log time over log length, a median of alternating runs of the operator
itself on two heads. The process keeps freed memory meanwhile: otherwise the longer inputs alone pay for fresh pages in
every run, and the slope is that of the allocator (1.1 to 1.25 in such runs, 0.9 to 1.1 without).
"""

from functools import partial

import torch
from torch import Tensor

from regard.api import attend
from regard.catalog import method
from regard.claims.lab import (
    generator,
    keep_freed_memory,
    median_times,
    random_qkv,
    relative_difference,
    seeded,
    slope,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured

VSSD = method("vssd")
HEADS, KEY, VALUE, WIDTH = 2, 64, 64, 64
TOKENS = 196
LENGTHS = (784, 1600, 3136, 6400, 12544)
RUNS = 51


def inputs(n: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor], Tensor]:
    g = generator(seed)
    qkv = tuple(t * t.shape[-1] ** -0.5 for t in random_qkv(g, HEADS, n, KEY, VALUE))
    with seeded(seed):
        dims = {"heads": HEADS, "kv_heads": HEADS, "key": KEY, "value": VALUE, "width": WIDTH}
        params = VSSD.page.init(VSSD.config, dims)
    return qkv, params, torch.randn(1, n, WIDTH, generator=g)


def change_under_permutation(name: str, pattern: str) -> float:
    (q, k, v), params, x = inputs(TOKENS)
    order = torch.randperm(TOKENS, generator=generator(1))
    out = attend(q, k, v, name, pattern, params=params, x=x).out
    moved = attend(*(t[:, :, order] for t in (q, k, v)), name, pattern, params=params, x=x[:, order]).out
    return relative_difference(moved[:, :, order.argsort()], out)


def quadratic_form() -> float:
    """The operator against (q kᵀ ⊙ m) v + D v, all N × N weights written out here."""
    (q, k, v), params, x = inputs(TOKENS)
    step = torch.nn.functional.softplus(x @ params["w_dt"] + params["dt_bias"]).mT  # [B, H, N]
    m = step * params["a_log"].exp()[:, None]
    wanted = torch.einsum("bhnd,bhmd,bhm,bhme->bhne", *(t.double() for t in (q, k, m, v)))
    wanted = wanted + params["d"].view(-1, 1, 1) * v.double()
    return relative_difference(attend(q, k, v, "vssd", "self", params=params, x=x).out.double(), wanted)


def exponent() -> tuple[float, list[float]]:
    """Slope of log time over log length, and the milliseconds at each length."""
    prepared = {n: inputs(n) for n in LENGTHS}

    def mix(n: int) -> None:
        (q, k, v), params, x = prepared[n]
        VSSD.page.fast(q, k, v, VSSD.config, Call("self", params=params, x=x))

    keep_freed_memory()
    with torch.no_grad():
        times = list(median_times({n: partial(mix, n) for n in LENGTHS}, RUNS).values())
    return slope(LENGTHS, times), [1000 * t for t in times]


def measure() -> Measured:
    noncausal = change_under_permutation("vssd", "self")
    causal = change_under_permutation("ssd", "causal_self")
    quadratic = quadratic_form()
    with threads(1):
        grown, times = exponent()
    numbers = {
        "noncausal_change": noncausal,
        "causal_change": causal,
        "off_quadratic_form": quadratic,
        "time_exponent": grown,
        "milliseconds": times,
    }
    parts = {
        "outputs permute": noncausal < 1e-5,
        "causal ones do not": causal > 1e-2,
        "the quadratic form": quadratic < 1e-5,
        "time": grown <= 1.15,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="vssd",
    statement=(
        "non-causal state space duality permutes its outputs with its tokens, at linear cost, while the outputs of "
        "causal duality depend on the order of scanning"
    ),
    bound=(
        "change under a permutation < 1e-5 without and > 1e-2 with causality; equal to the quadratic form within 1e-5; "
        "time exponent <= 1.15"
    ),
    measure=measure,
)
