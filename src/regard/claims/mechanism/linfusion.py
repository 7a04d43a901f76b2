"""LinFusion's claim: an image of four times the pixels, each pixel repeated, gives each pixel what it gave before."""

from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, paired_ratios, random_qkv, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import linfusion as page
from regard.ops import linear

HEADS, WIDTH, INPUT, SHORT, LONG = 4, 16, 64, 4_096, 16_384


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = generator()
    return *random_qkv(g, HEADS, n, WIDTH), torch.randn(1, n, INPUT, generator=g)


def measure() -> Measured:
    cfg = page.Config()
    with seeded(0):
        params = page.init(
            cfg, {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": INPUT}
        )
    q, k, v, x = drawn(1_024)
    four = [t.repeat_interleave(4, dim=-2) for t in (q, k, v, x)]
    once = page.METHOD.fast(q, k, v, cfg, Call("self", params=params, x=x))[0]
    often = page.METHOD.fast(*four[:3], cfg, Call("self", params=params, x=four[3]))[0]
    change = difference(often, once.repeat_interleave(4, dim=2))
    sums = []
    for q_n, k_n, v_n, x_n in ((q, k, v, x), four):
        form = page.form(q_n, k_n, v_n, cfg, Call("self", params=params, x=x_n))
        sums.append(linear(form.q, form.k, v_n, pattern="self")[0])
    ratio = (sums[1].norm() / sums[0].repeat_interleave(4, dim=2).norm()).item()
    inputs = {n: drawn(n) for n in (SHORT, LONG)}

    def mix(n: int) -> None:
        *qkv, x_n = inputs[n]
        page.METHOD.fast(*qkv, cfg, Call("self", params=params, x=x_n))

    with threads(1), torch.no_grad():
        times = paired_ratios(partial(mix, SHORT), partial(mix, LONG), rounds=9)
    short, long = times.medians
    holds = change < 1e-5 and abs(ratio - 4) <= 0.1 and times.of_medians <= 5
    return Measured(
        holds,
        {
            "change_by_repeating": change,
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
