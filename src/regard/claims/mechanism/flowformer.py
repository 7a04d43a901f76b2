"""Flowformer's claim: flow is conserved, the linear form is the quadratic definition, and its time is linear.

The flow from source j to sink i is φ(q_i)·φ(k_j). Divided by the page's inflow it sums to one over the sources of each
sink, divided by its outflow to one over the sinks of each source. The definition is written here once more, with all
N x M flows, in float64; the page's fast path runs in float32.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import difference, generator, median_times, slope, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import flowformer as page

SHORT, LONG = 2_048, 16_384
EPS = 1e-6


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = q.sigmoid() + EPS, k.sigmoid() + EPS
    to_sink, to_source = a @ k.sigmoid().mT, b @ q.sigmoid().mT  # [.., N, M], [.., M, N]
    into = to_sink.sum(-1, keepdim=True) + EPS * a.sum(-1, keepdim=True)
    out_of = to_source.sum(-1, keepdim=True) + EPS * b.sum(-1, keepdim=True)
    kept_in = (to_sink / out_of.mT).sum(-1, keepdim=True) + EPS * a.sum(-1, keepdim=True)
    kept_out = (to_source / into.mT).sum(-1, keepdim=True) + EPS * b.sum(-1, keepdim=True)
    competition = kept_out.clamp(-1, 1).softmax(-2) * k.shape[-2]
    mixed = (q.sigmoid() @ k.sigmoid().mT / into) @ (competition * v)
    return (kept_in * q.shape[-2] / k.shape[-2]).sigmoid() * mixed


def exponents(sides: dict[str, Callable], repeats: int = 5) -> dict[str, float]:
    """The exponent of each side's median time from SHORT to LONG; the sides take turns."""
    times = []
    for n in (SHORT, LONG):
        qkv = [torch.randn(1, 2, n, 32, generator=generator(i)) for i in range(3)]
        times.append(median_times({name: partial(side, *qkv) for name, side in sides.items()}, repeats))
    return {name: slope((SHORT, LONG), [medians[name] for medians in times]) for name in sides}


def measure() -> Measured:
    g = generator()
    q, k, v = (torch.randn(2, 4, n, 32, generator=g) for n in (200, 300, 300))
    phi_q, phi_k = q.sigmoid(), k.sigmoid()
    flow = phi_q @ phi_k.mT
    into, out_of = (
        page.met(phi_q, phi_k.sum(2, keepdim=True), EPS),
        page.met(phi_k, phi_q.sum(2, keepdim=True), EPS),
    )
    conserved = max(
        ((flow / into).sum(-1) - 1).abs().max(), ((flow / out_of.mT).sum(-2) - 1).abs().max()
    ).item()
    cfg, differences = page.Config(), []
    for pattern, m in (("cross", 300), ("self", 200)):
        wanted = quadratic(q.double(), k[:, :, :m].double(), v[:, :, :m].double())
        result = page.METHOD.fast(q, k[:, :, :m], v[:, :, :m], cfg, Call(pattern))[0]
        differences.append(difference(result, wanted))
    with threads(1), torch.no_grad():
        grown = exponents(
            {
                "flow": lambda q, k, v: page.METHOD.fast(q, k, v, cfg, Call("self")),
                "flow_causal": lambda q, k, v: page.METHOD.fast(q, k, v, cfg, Call()),
                "sdpa": scaled_dot_product_attention,
            }
        )
    parts = {
        "flow": conserved < 1e-4,
        "the quadratic form": max(differences) < 1e-5,
        "time": grown["flow"] <= 1.2 and grown["flow_causal"] <= 1.2,
        "time of softmax": grown["sdpa"] > 1.6,
    }
    numbers = {"flow_error": conserved, "difference_cross": differences[0], "difference_self": differences[1]}
    return Measured.by(parts, numbers | {f"time_exponent_{name}": value for name, value in grown.items()})


CLAIM = Claim(
    name="flowformer",
    statement="flow is conserved at sinks and sources, the linear form equals the quadratic one, and time is linear",
    bound="|flow - 1| < 1e-4; difference < 1e-5; time exponent 2k to 16k <= 1.2, and that of SDPA > 1.6",
    measure=measure,
)
