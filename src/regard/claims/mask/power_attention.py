"""PowerAttention's claim, on reachability: which tokens can a row hear of through d layers?"""

import math

import torch
from torch import Tensor

from regard.core.claim import Claim, Measured
from regard.core.mask import Mask, causal, predicate, window
from regard.methods.masks import power_attention

N = 1024  # 2 ** 10 distances


@predicate()
def strided(at, stride: int, local: int = 1):
    """Every stride-th key back, and a local window."""
    age = at.q - at.k
    return (age < local) | (age % stride == 0)


def reach(mask: Mask, depth: int) -> list[Tensor]:
    """Booleans [N, N] after 1 .. depth layers: row i hears of column j along some path of the mask."""
    step = mask.dense(N)[0, 0].float()
    heard, all_depths = torch.eye(N), []
    for _ in range(depth):
        heard = ((step @ heard) > 0).float()
        all_depths.append(heard.bool())
    return all_depths


def holes(heard: Tensor, distance: int) -> int:
    """Pairs nearer than `distance` that no path joins."""
    age = torch.arange(N)[:, None] - torch.arange(N)
    return int(((age >= 0) & (age < distance) & ~heard).sum())


def measure() -> Measured:
    depth = int(math.log2(N))
    powers = power_attention.build(power_attention.Config(local=1, sinks=0, block=1))
    budget = int(powers.dense(N).sum(-1).max())
    missing = [holes(heard, 2**d) for d, heard in enumerate(reach(powers, depth), start=1)]
    farthest = [N - 1 - int(heard[-1].int().argmax()) for heard in reach(causal() & window(budget), depth)]
    expected = [d * (budget - 1) for d in range(1, depth + 1)]
    dilated = reach(causal() & strided(math.ceil(N / budget)), depth)[-1]
    slashed = reach(causal() & strided(math.ceil(2 * N / budget), local=budget // 2), depth)[-1]
    beside = power_attention.build(power_attention.Config(local=5, sinks=1, block=1)) & ~window(5)
    far = int(beside.dense(N).sum(-1).max())
    numbers = {
        "power_holes_by_depth": missing,
        "keys_per_row": budget,
        "window_reach_by_depth": farthest,
        "window_reach_expected": expected,
        "dilated_holes": holes(dilated, N),
        "window_and_stride_holes": holes(slashed, N),
        "non_local_keys": max(far, budget - 1),
        "non_local_bound": depth + 2,
    }
    parts = {
        "no holes": not any(missing),
        "reach of a window": farthest == expected,
        "non-local keys": max(far, budget - 1) <= depth + 2,
        "strided masks have holes": holes(dilated, N) > 0 and holes(slashed, N) > 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="power_attention",
    statement=(
        "with itself and powers of two d layers reach every distance below 2^d without holes; a window of as "
        "many keys per row reaches d * (keys - 1) only, and strided masks leave holes"
    ),
    bound=(
        "holes below 2^d = 0 for d = 1..10; window reach exactly d * (w - 1); at most log2(N) + 2 non-local "
        "keys per row; strided masks with the same budget have holes"
    ),
    measure=measure,
)
