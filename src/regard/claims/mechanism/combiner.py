"""Combiner's claim: a distribution over every visible key, at sub-quadratic cost.

Weights are read off with values that are the rows of a unit matrix. For comparison: the same blocks as a sparse
pattern, each query seeing its own block alone, leave most visible keys at zero. Times are of causal_self with blocks of
√N tokens.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import (
    difference,
    generator,
    keep_freed_memory,
    median_times,
    random_qkv,
    slope,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import combiner as page

TOKENS, BLOCK, HEADS, WIDTH = 1_000, 32, 2, 32
LENGTHS = (1_024, 4_096, 16_384)


def attend(q: Tensor, k: Tensor, v: Tensor, block: int, pattern: str = "causal_self") -> Tensor:
    return page.METHOD.fast(q, k, v, page.Config(block=block), Call(pattern))[0]


def weights(pattern: str) -> Tensor:
    q, k, _ = random_qkv(generator(), HEADS, TOKENS, WIDTH)
    unit = torch.eye(TOKENS).expand(1, HEADS, -1, -1)
    return attend(q, k, unit, BLOCK, pattern)


def future_edit() -> float:
    """How far outputs up to a token move when all tokens after it change, over tokens about the borders of blocks."""
    q, k, v = random_qkv(generator(), HEADS, 200, WIDTH)
    whole, most = attend(q, k, v, BLOCK), 0.0
    for i in (0, 30, 31, 32, 63, 64, 100, 191, 198):
        others = [torch.cat([t[:, :, : i + 1], t[:, :, i + 1 :] + 3], dim=2) for t in (q, k, v)]
        most = max(most, difference(attend(*others, block=BLOCK)[:, :, : i + 1], whole[:, :, : i + 1]))
    return most


def exponents(rounds: int = 5) -> dict[str, float]:
    times: dict[str, list[float]] = {"combiner": [], "sdpa": []}
    for n in LENGTHS:
        q, k, v = random_qkv(generator(), HEADS, n, WIDTH)
        sides = {
            "combiner": partial(attend, q, k, v, math.isqrt(n)),
            "sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=True),
        }
        for name, seconds in median_times(sides, rounds).items():
            times[name].append(seconds)
    return {name: slope(LENGTHS, seconds) for name, seconds in times.items()}


def measure() -> Measured:
    lower = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    block = torch.arange(TOKENS) // BLOCK
    sparse = (block == block[:, None]) & lower
    with threads(1), torch.no_grad():
        causal, full = weights("causal_self"), weights("self")
        sums = max((w.sum(-1) - 1).abs().max().item() for w in (causal, full))
        least = min(causal[..., lower].min().item(), full.min().item())
        later = causal[..., ~lower].abs().max().item()
        q, k, v = random_qkv(generator(1), HEADS, TOKENS, WIDTH)
        alone = attend(q, k, v, TOKENS)
        same = difference(alone, scaled_dot_product_attention(q, k, v, is_causal=True))
        edit = future_edit()
        keep_freed_memory()
        grown = exponents()
    parts = {
        "row sums": sums <= 1e-5,
        "every visible key": least > 0,
        "nothing of the future": later == 0 and edit == 0,
        "a single block": same < 1e-5,
        "time": grown["combiner"] <= 1.65,
    }
    numbers = {
        "row_sums_off_by": sums,
        "least_weight_of_a_visible_key": least,
        "visible_keys_at_zero_in_the_sparse_pattern": 1 - sparse.sum().item() / lower.sum().item(),
        "difference_of_a_single_block": same,
        "future_edit_moves": max(edit, later),
        "time_exponent": grown["combiner"],
        "time_exponent_sdpa": grown["sdpa"],
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="combiner",
    statement=(
        "every row is a distribution with a positive weight on every visible key, where the sparse pattern has zeros, "
        "at sub-quadratic cost; a single block is full attention"
    ),
    bound=(
        "row sums 1 ± 1e-5; least weight > 0; single block within 1e-5 of full attention; an edit of the future moves "
        "nothing; time exponent <= 1.65"
    ),
    measure=measure,
)
