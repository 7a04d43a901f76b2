"""Lean Attention's claim: any split, merged in any order, is the same attention; stream-K loads differ by a tile."""

import random

import torch
from torch import Tensor

from regard.claims.lab import difference, generator
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.dense.lean_attention import fixed_split, loads, schedule
from regard.ops import explicit, finish, merge, partial

SPLITS, SCHEDULES, TILE = 100, 1000, 256


def in_any_order(q: Tensor, k: Tensor, v: Tensor, rng: random.Random) -> Tensor:
    """Attention from unequal spans of keys, some of them empty, whose partial results meet in a random tree."""
    m, scale = k.shape[2], q.shape[-1] ** -0.5
    cuts = sorted(rng.randint(0, m) for _ in range(rng.randint(1, 12)))
    ends = zip([0, *cuts], [*cuts, m], strict=True)
    parts = [partial(q, k[:, :, a:b], v[:, :, a:b], scale) for a, b in ends]
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(merge(parts.pop(), parts.pop()))
    return finish(*parts[0])


def worst_difference(sharp: float, dtype: torch.dtype) -> float:
    """Split against unsplit attention over lengths 1 .. 700, queries `sharp` times a normal draw."""
    g, rng, worst = generator(), random.Random(0), 0.0
    for _ in range(SPLITS):
        m = rng.randint(1, 700)
        q, k, v = (torch.randn(2, 2, n, 16, generator=g).to(dtype) for n in (1, m, m))
        whole = explicit(q * sharp, k, v, scale=0.25)
        worst = max(worst, difference(in_any_order(q * sharp, k, v, rng), whole))
    return worst


def spread(work: list) -> int:
    return max(loads(work)) - min(loads(work))


def spreads(rng: random.Random) -> tuple[list[int], list[int]]:
    """max - min tiles of a worker: stream-K, and the fixed split with the fewest parts that occupy every worker."""
    lean, fixed = [], []
    for _ in range(SCHEDULES):
        batch, heads, workers = rng.randint(1, 8), rng.randint(1, 32), rng.choice([8, 56, 108, 132])
        tiles = [-(-rng.randint(1, 65536) // TILE) for _ in range(batch)]
        # the rows of a batch differ in length, their heads do not
        tiles = [t for t in tiles for _ in range(heads)]
        splits = -(-workers // len(tiles))
        lean.append(spread(schedule(tiles, workers)))
        fixed.append(spread(fixed_split(tiles, splits, workers)))
    return lean, fixed


def measure() -> Measured:
    plain, sharp = worst_difference(1.0, torch.float32), worst_difference(100.0, torch.float64)
    lean, fixed = spreads(random.Random(1))
    middle = sorted(fixed)[SCHEDULES // 2]
    numbers = {
        "difference_float32": plain,
        "difference_float64_scores_in_hundreds": sharp,
        "lean_spread_worst": max(lean),
        "fixed_spread_median": middle,
        "fixed_spread_worst": max(fixed),
        "fixed_share_above_one_tile": sum(s > 1 for s in fixed) / SCHEDULES,
    }
    parts = {
        "any split and order": max(plain, sharp) < 1e-5,
        "even loads": max(lean) <= 1,
        "uneven fixed splits": middle > 1,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="lean_attention",
    statement=(
        "any unequal split of the keys, merged in any order, gives the same output, and the loads of stream-K's "
        "workers differ by at most one tile, unlike those of a fixed split"
    ),
    bound=(
        "difference < 1e-5 over 100 random splits and orders; max - min tiles <= 1 over 1,000 random (batch, heads, "
        "lengths, workers); the fixed split's median over the same > 1"
    ),
    measure=measure,
)
