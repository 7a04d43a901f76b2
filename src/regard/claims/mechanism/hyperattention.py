"""HyperAttention's claim: where few scores are large it beats uniform sampling of as many keys, in near-linear time.

Queries and keys lie near 1,024 directions, eight keys to each, so that a query's attention lies on a thousandth of the
keys: what its hashes are for. The numbers name beside it what happens where each of 32 loose clusters holds 256 keys,
which any sample meets, and where nothing is clustered: there uniform sampling is the better of the two.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from regard.claims.lab import (
    difference,
    generator,
    keep_freed_memory,
    mean,
    median_times,
    paired_ratios,
    random_qkv,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import hyperattention as page

LENGTH, WIDTH, HEADS, SEEDS = 8_192, 64, 2, 3
SHORT, MIDDLE, LONG = 4_096, 16_384, 32_768
CFG = page.Config()


def clustered(
    g: torch.Generator, clusters: int, radius: float, noise: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k around the same centres of this norm, v around one value for each centre."""
    centre, value = (torch.randn(1, HEADS, clusters, WIDTH, generator=g) for _ in range(2))
    centre = radius * normalize(centre, dim=-1)
    of_q, of_k = (torch.randint(clusters, (LENGTH,), generator=g) for _ in range(2))
    around = ((centre, of_q, noise), (centre, of_k, noise), (value, of_k, 0.5))
    q, k, v = (c[:, :, of] + by * torch.randn(1, HEADS, LENGTH, WIDTH, generator=g) for c, of, by in around)
    return q, k, v


def uniform(q: Tensor, k: Tensor, v: Tensor, g: torch.Generator) -> Tensor:
    """Softmax attention over as many keys as a query of the page reads, drawn uniformly."""
    drawn = torch.randint(LENGTH, (CFG.block + CFG.sample,), generator=g)
    return scaled_dot_product_attention(q, k[:, :, drawn], v[:, :, drawn])


def errors(draw: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Mean relative error against full attention: of the page, and of uniform sampling."""
    found = []
    for seed in range(SEEDS):
        g = generator(seed)
        q, k, v = draw(g)
        exact = scaled_dot_product_attention(q, k, v)
        both = page.METHOD.fast(q, k, v, page.Config(seed=seed), Call("self"))[0], uniform(q, k, v, g)
        found.append([((out - exact).norm() / exact.norm()).item() for out in both])
    page_error, uniform_error = (mean(side) for side in zip(*found, strict=True))
    return page_error, uniform_error


def from_full(n: int = 2_000) -> float:
    """Difference from full attention where a block holds all keys."""
    q, k, v = random_qkv(generator(), HEADS, n, WIDTH)
    cfg = page.Config(block=n, exact_below=64)
    sides = (("self", False), ("causal_self", True))
    return max(
        difference(
            page.METHOD.fast(q, k, v, cfg, Call(pattern))[0],
            scaled_dot_product_attention(q, k, v, is_causal=causal),
        )
        for pattern, causal in sides
    )


def growth(rounds: int = 5) -> dict[str, float]:
    """What four times the tokens cost, without a causal mask: the page, and full attention."""
    sides = {}
    for n in (SHORT, MIDDLE):
        qkv = random_qkv(generator(), HEADS, n, WIDTH)
        sides["hyperattention", n] = partial(page.METHOD.fast, *qkv, CFG, Call("self"))
        sides["exact", n] = partial(scaled_dot_product_attention, *qkv)
    times = median_times(sides, rounds, clock=time.process_time)
    return {name: times[name, MIDDLE] / times[name, SHORT] for name in ("hyperattention", "exact")}


def exponent(rounds: int = 7) -> float:
    """Of causal attention from SHORT to LONG, of the seconds that the processor gave to it."""
    short, long = (
        partial(page.METHOD.fast, *random_qkv(generator(), 8, n, WIDTH), CFG, Call()) for n in (SHORT, LONG)
    )
    ratio = paired_ratios(short, long, rounds, clock=time.process_time).median
    return math.log(ratio) / math.log(LONG / SHORT)


def measure() -> Measured:
    keep_freed_memory()
    with threads(1), torch.no_grad():
        off, grown, causal = from_full(), growth(), exponent()
        small = errors(partial(clustered, clusters=1024, radius=10.0, noise=0.1))
        large = errors(partial(clustered, clusters=32, radius=6.0, noise=0.5))
        none = errors(lambda g: random_qkv(g, HEADS, LENGTH, WIDTH))
    parts = {
        "below uniform sampling": small[0] <= 0.5 * small[1],
        "full attention": off < 1e-5,
        "time exponent": causal <= 1.25,
        "time at 4 times the tokens": grown["hyperattention"] <= 6,
        "time of full attention": grown["exact"] > 10,
    }
    numbers = {"difference_block_of_n": off, "time_exponent_causal_4k_32k": causal}
    numbers |= {f"time_16k_over_4k_{name}": ratio for name, ratio in grown.items()}
    for name, (ours, theirs) in {"1024_clusters": small, "32_clusters": large, "no_clusters": none}.items():
        numbers |= {f"error_{name}": ours, f"error_uniform_{name}": theirs}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="hyperattention",
    statement="on clustered keys its error is below that of uniform sampling of as many keys, its time grows "
    "near-linearly, and with block >= N it is full attention",
    bound="relative error <= 0.5 times that of uniform sampling; time(16k) / time(4k) <= 6 with exact > 10; causal "
    "time exponent 4k to 32k <= 1.25; with block >= N difference < 1e-5",
    measure=measure,
)
