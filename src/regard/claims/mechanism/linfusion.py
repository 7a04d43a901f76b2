"""LinFusion's claim: an image of four times the pixels, each pixel repeated, gives each pixel what it gave before."""

import statistics
import time

import torch
from torch import Tensor

from regard.ops.threads import threads
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import linfusion as page
from regard.ops import linear

HEADS, WIDTH, INPUT, SHORT, LONG = 4, 16, 64, 4_096, 16_384


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH, generator=g) for _ in range(3))
    return q, k, v, torch.randn(1, n, INPUT, generator=g)


def measure() -> Measured:
    cfg = page.Config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = page.init(
            cfg, {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": INPUT}
        )
    q, k, v, x = drawn(1_024)
    four = [t.repeat_interleave(4, dim=-2) for t in (q, k, v, x)]
    once = page.fast(q, k, v, cfg, pattern="self", params=params, x=x)[0]
    often = page.fast(*four[:3], cfg, pattern="self", params=params, x=four[3])[0]
    change = (often - once.repeat_interleave(4, dim=2)).abs().max().item()
    sums = []
    for q_n, k_n, v_n, x_n in ((q, k, v, x), four):
        phi_q, phi_k = page.features(q_n, k_n, cfg, "self", params, x_n)
        sums.append(linear(phi_q, phi_k, v_n, pattern="self")[0])
    ratio = (sums[1].norm() / sums[0].repeat_interleave(4, dim=2).norm()).item()
    taken: dict[int, list[float]] = {SHORT: [], LONG: []}
    with threads(1), torch.no_grad():
        asked = {n: drawn(n) for n in taken}
        for turn in range(10):
            for n, times in taken.items():
                *qkv, x_n = asked[n]
                start = time.perf_counter()
                page.fast(*qkv, cfg, pattern="self", params=params, x=x_n)
                if turn:  # the first warms up
                    times.append(time.perf_counter() - start)
    short, long = (statistics.median(times) for times in taken.values())
    holds = change < 1e-5 and abs(ratio - 4) <= 0.1 and long / short <= 5
    return Measured(
        holds,
        {
            "change_by_repeating": change,
            "ratio_without_means": ratio,
            "time_ratio_16k_4k": long / short,
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
