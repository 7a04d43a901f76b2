"""Tensor attention's claim: the polynomial route is its dense tensor, and near e^s only while entries are small."""

import math
from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, median_times, slope, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import tensor_attention as page

WIDTH, TOKENS, SHORT, LONG = 8, 40, 1_024, 8_192


def drawn(n: int, most: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, x, with entries of q, k and k' uniform in ±most; x holds k' and v' side by side, which params pick."""
    g = generator()
    q, k, k_2 = (most * (2 * torch.rand(1, 1, n, WIDTH, generator=g, dtype=dtype) - 1) for _ in range(3))
    v, v_2 = (torch.randn(1, 1, n, WIDTH, generator=g, dtype=dtype) for _ in range(2))
    return q, k, v, torch.cat([k_2, v_2], dim=-1)[:, 0]


def picks(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    key, value = torch.eye(2 * WIDTH, dtype=dtype).split(WIDTH)
    return {"key": key, "value": value}


def dense(q: Tensor, k: Tensor, v: Tensor, x: Tensor, degree: int | None) -> Tensor:
    """The definition: e^s over all pairs, or its Taylor polynomial."""
    k_2, v_2 = x[:, None].split(WIDTH, dim=-1)
    s = torch.einsum("bhic,bhjc,bhlc->bhijl", q, k, k_2) / WIDTH
    w: Tensor = s.exp() if degree is None else sum(s**r / math.factorial(r) for r in range(degree + 1))
    return torch.einsum("bhijl,bhje,bhle->bhie", w, v, v_2) / w.sum((-1, -2))[..., None]


def routes(most: float, degree: int = 4) -> tuple[float, float]:
    """(difference of the page's fast path from the dense polynomial, relative error of it against e^s)."""
    q, k, v, x = drawn(TOKENS, most)
    result = page.METHOD.fast(q, k, v, page.Config(degree=degree), Call("self", params=picks(), x=x))[0]
    exact = dense(q, k, v, x, None)
    return difference(result, dense(q, k, v, x, degree)), ((result - exact).norm() / exact.norm()).item()


def exponent(repeats: int = 7) -> float:
    cfg, inputs = page.Config(), {n: drawn(n, 1.0, torch.float32) for n in (SHORT, LONG)}

    def mix(n: int) -> None:
        *qkv, x = inputs[n]
        page.METHOD.fast(*qkv, cfg, Call("self", params=picks(torch.float32), x=x))

    times = median_times({n: partial(mix, n) for n in inputs}, repeats)
    return slope(list(times), list(times.values()))


def measure() -> Measured:
    (same_1, near), (same_3, far) = routes(1.0), routes(3.0)
    with threads(1), torch.no_grad():
        grown = exponent()
    parts = {
        "the dense tensor": max(same_1, same_3) < 1e-6,
        "near for small entries": near < 1e-2,
        "far for large ones": far > 10 * near,
        "time": grown <= 1.3,
    }
    numbers = {
        "difference_from_dense": max(same_1, same_3),
        "relative_error_entries_1": near,
        "relative_error_entries_3": far,
        "time_exponent_1k_8k": grown,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="tensor_attention",
    statement="the polynomial route is the dense tensor of its degree, near e^s for small entries and not for large",
    bound=(
        "difference from dense < 1e-6 in float64; at degree 4 relative error < 1e-2 for entries within 1, and more "
        "than 10 times that within 3; time exponent <= 1.3"
    ),
    measure=measure,
)
