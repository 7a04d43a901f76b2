"""The claim of Faster Neighbourhood Attention: tiles give what masked dense attention gives, at linear cost.

The mask is written here from the words: on every axis a place reads the w places nearest to it among those of its
residue modulo d, on a causal axis among those up to itself; of two that are equally near the one before. It is asked
of lines, images and clips, so small that most places stand near a border. Speed is that of 7 x 7 windows in float32 on
one core, seconds that the processor gave to it: from 48 x 48 to 128 x 128 places, and at 64 x 64 next to torch's fused
softmax attention under the same mask, which reads all 4,096 keys of each query.
"""

import itertools
import time
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import (
    difference,
    generator,
    keep_freed_memory,
    median_times,
    paired_ratios,
    random_qkv,
    slope,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import fused_neighborhood_attention as page

HEADS, WIDTH = 4, 32
GRIDS = ((67,), (17, 23), (6, 7, 9))
WINDOWS, DILATIONS = (2, 3, 5), (1, 2, 3)
SIDES, SIDE = (48, 64, 96, 128), 64
ROUNDS = 9


def nearest(side: int, window: int, dilation: int = 1, causal: bool = False) -> Tensor:
    """[side, side] bool: which places of an axis each place reads."""
    seen = torch.zeros(side, side, dtype=torch.bool)
    for i in range(side):
        own = [j for j in range(side) if (j - i) % dilation == 0 and not (causal and j > i)]
        seen[i, sorted(own, key=lambda j: (abs(j - i), j))[:window]] = True
    return seen


def mask_of(axes: list[Tensor]) -> Tensor:
    """[N, N] of a grid: what is seen on every axis."""
    whole = axes[0]
    for axis in axes[1:]:
        whole = (whole[:, None, :, None] & axis[None, :, None]).flatten(2).flatten(0, 1)
    return whole


def off_dense(sides: tuple[int, ...], window: int, dilation: int, causal: bool) -> float:
    """Of one grid; the last axis is causal if any is."""
    flags = (*(False,) * (len(sides) - 1), causal)
    cfg = page.Config(window=window, dilation=dilation, causal=flags)
    seen = mask_of([nearest(side, window, dilation, flag) for side, flag in zip(sides, flags, strict=True)])
    q, k, v = random_qkv(generator(window), HEADS, len(seen), WIDTH)
    return difference(mixed(q, k, v, cfg, sides), scaled_dot_product_attention(q, k, v, seen))


def mixed(q: Tensor, k: Tensor, v: Tensor, cfg: page.Config, sides: tuple[int, ...]) -> Tensor:
    return page.METHOD.fast(q, k, v, cfg, Call("self", grid=sides))[0]


def off_full(sides: tuple[int, ...]) -> float:
    """Of windows as long as each axis from attention of all to all."""
    q, k, v = random_qkv(generator(), HEADS, int(torch.tensor(sides).prod()), WIDTH)
    return difference(mixed(q, k, v, page.Config(window=sides), sides), scaled_dot_product_attention(q, k, v))


def tiled(side: int) -> partial:
    return partial(mixed, *random_qkv(generator(), HEADS, side**2, WIDTH), page.Config(), (side, side))


def times() -> tuple[float, float, list[float]]:
    """(exponent over SIDES, dense over tiled at SIDE, milliseconds at SIDES)."""
    keep_freed_memory()
    seconds = list(
        median_times({side: tiled(side) for side in SIDES}, ROUNDS, clock=time.process_time).values()
    )
    q, k, v = random_qkv(generator(), HEADS, SIDE**2, WIDTH)
    dense = partial(scaled_dot_product_attention, q, k, v, mask_of([nearest(SIDE, page.Config().window)] * 2))
    ratio = paired_ratios(tiled(SIDE), dense, ROUNDS, clock=time.process_time).median
    return slope([side**2 for side in SIDES], seconds), ratio, [1000 * s for s in seconds]


def measure() -> Measured:
    with threads(1), torch.no_grad():
        asked = itertools.product(GRIDS, WINDOWS, DILATIONS, (False, True))
        most, full = max(off_dense(*a) for a in asked), max(map(off_full, GRIDS))
        grown, faster, milliseconds = times()
    numbers = {
        "difference_from_masked_dense": most,
        "difference_of_full_windows": full,
        "time_exponent": grown,
        "dense_over_tiled_4096": faster,
        "milliseconds": milliseconds,
    }
    parts = {
        "masked dense": most < 1e-5,
        "full windows": full < 1e-5,
        "time exponent": grown <= 1.15,
        "time over dense": faster >= 2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="fused_neighborhood_attention",
    statement=(
        "tiles of queries over shared boxes of keys give masked dense attention, windows of full length give "
        "self-attention, and cost is linear in the places of a grid"
    ),
    bound=(
        "difference < 1e-5 from masked dense attention on lines, images and clips, at all borders, dilations and "
        "causal axes, and from self-attention with windows of full length; time exponent <= 1.15 from 48 x 48 to "
        "128 x 128 at 7 x 7; at 64 x 64 at least 2 times as fast as masked dense attention"
    ),
    measure=measure,
)
