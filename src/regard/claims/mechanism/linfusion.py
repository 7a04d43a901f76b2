"""LinFusion's claim: an image of four times the pixels, each pixel repeated, gives each pixel what it gave before.

In a quotient of means the number of keys cancels but for eps. So it is asked as well with few tokens and an eps of 0.5,
and there the same quotient over sums, whose eps is not counted by keys, does change.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, paired_ratios, random_qkv, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import linfusion as page
from regard.ops import linear

HEADS, WIDTH, INPUT, SHORT, LONG = 4, 16, 64, 4_096, 16_384
FEW, EPS = 4, 0.5


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = generator()
    return *random_qkv(g, HEADS, n, WIDTH), torch.randn(1, n, INPUT, generator=g)


def fourfold(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.repeat_interleave(4, dim=-2) for t in (q, k, v, x))


def change_by_repeating(given: tuple[Tensor, ...], mix: Callable[..., Tensor]) -> float:
    return difference(mix(*fourfold(*given)), mix(*given).repeat_interleave(4, dim=2))


def page_of(cfg: page.Config, params: dict[str, Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, x: page.METHOD.fast(q, k, v, cfg, Call("self", params=params, x=x))[0]


def sums_of(cfg: page.Config, params: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Plain sums of the page's features: of values, and of ones in the last channel."""

    def sums(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        form = page.form(q, k, v, cfg, Call("self", params=params, x=x))
        return linear(form.q, form.k, form.v, pattern="self")[0]

    return sums


def quotient_of_sums(cfg: page.Config, params: dict[str, Tensor]) -> Callable[..., Tensor]:
    def quotient(*given: Tensor) -> Tensor:
        out = sums_of(cfg, params)(*given)
        return out[..., :-1] / (out[..., -1:] + cfg.eps)

    return quotient


def measure() -> Measured:
    cfg, far = page.Config(), page.Config(eps=EPS)
    with seeded(0):
        params = page.init(
            cfg, {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": INPUT}
        )
    given, few = drawn(1_024), drawn(FEW)
    change, change_few = (
        change_by_repeating(*side) for side in ((given, page_of(cfg, params)), (few, page_of(far, params)))
    )
    change_sums = change_by_repeating(few, quotient_of_sums(far, params))
    sums = [sums_of(cfg, params)(*side)[..., :-1] for side in (given, fourfold(*given))]
    ratio = (sums[1].norm() / sums[0].repeat_interleave(4, dim=2).norm()).item()
    inputs = {n: drawn(n) for n in (SHORT, LONG)}

    def mix(n: int) -> None:
        *qkv, x_n = inputs[n]
        page.METHOD.fast(*qkv, cfg, Call("self", params=params, x=x_n))

    with threads(1), torch.no_grad():
        times = paired_ratios(partial(mix, SHORT), partial(mix, LONG), rounds=9)
    short, long = times.medians
    parts = {
        "repeating changes nothing": max(change, change_few) < 1e-5,
        "sums grow": abs(ratio - 4) <= 0.1 and change_sums > 1e-3,
        "time": times.of_medians <= 5,
    }
    return Measured.by(
        parts,
        {
            "change_by_repeating": change,
            "change_by_repeating_few_at_eps_0.5": change_few,
            "change_of_quotient_of_sums_at_eps_0.5": change_sums,
            "ratio_without_means": ratio,
            "time_ratio_16k_4k": times.of_medians,
            "ms_4k": 1e3 * short,
            "ms_16k": 1e3 * long,
        },
    )


CLAIM = Claim(
    name="linfusion",
    statement="repeating every token four times changes no output, while plain sums grow with N; time is linear in N",
    bound="change < 1e-5; ratio without means 4 ± 0.1; time(16k) / time(4k) <= 5",
    measure=measure,
)
