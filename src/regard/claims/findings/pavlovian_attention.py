"""Attention as conditioning: how many random associations a memory of width d holds, by the rule that writes it.

    Hebbian    S = Σ k_iᵀ v_i                     the pages' linear sum, without features or denominator
    delta      S += β k_iᵀ (v_i - k_i S)          the page linear/delta_rule, β the best of three
    softmax    Σ softmax_i(√d k_i·q) v_i          the page dense/softmax, on keys of length √d as after a norm

Keys are random directions in d dimensions, values in 256, and every stored key is asked for. A number of pairs counts
as retrieved while the cosine of what comes back with the right value is at least 1/√2, on average over all stored
pairs: signal equals interference there. n* is the largest such number. For the Hebbian sum the interference of n pairs
is (n - 1)/d, so n* is about d + 1; the measurement is the slope of log n* over log d. Softmax is tried up to 8 d pairs,
all of which it retrieves.

The delta rule needs a small share: with β = 1 every write is exact and disturbs what lies before it, and one pass over
the pairs stores 0.9 d, less than the Hebbian sum; with 1/4 or 1/2 it stores 1.2 d.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.api import attend
from regard.claims.lab import generator, slope, threads
from regard.core.claim import Claim, Measured
from regard.ops import linear

WIDTHS = (16, 32, 64, 128, 256)
# trials are rows of the batch; at most 8 d pairs are stored
VALUE, TRIALS, MOST = 256, 16, 8
RETRIEVED = 0.5**0.5
SHARES = (0.25, 0.5, 1.0)  # β of the delta rule


def hebbian(k: Tensor, v: Tensor) -> Tensor:
    return linear(k, k, v, pattern="self")[0]


def softmax(k: Tensor, v: Tensor) -> Tensor:
    k = k * k.shape[-1] ** 0.5
    return attend(k, k, v, "softmax", "self").out


def delta(share: float):
    gate = torch.tensor([[20.0 if share == 1 else math.log(share / (1 - share))]])

    def rule(k: Tensor, v: Tensor) -> Tensor:
        x = torch.ones(len(k), k.shape[2], 1)
        return attend(k, k, v, "delta_rule", "self", params={"w_beta": gate}, x=x).out

    return rule


def cosine(rule, width: int, pairs: int) -> float:
    """Mean over trials and stored pairs of the cosine between what a key brings back and its value."""
    g = generator(pairs)
    k, v = (F.normalize(torch.randn(TRIALS, 1, pairs, d, generator=g), dim=-1) for d in (width, VALUE))
    return F.cosine_similarity(rule(k, v), v, dim=-1).mean().item()


def capacity(rule, width: int) -> int:
    """n*, by halving the interval; the cosine falls with the number of pairs."""
    low, high = 1, MOST * width
    if cosine(rule, width, high) >= RETRIEVED:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cosine(rule, width, middle) >= RETRIEVED else (low, middle)
    return low


@torch.no_grad()
def capacities() -> dict[str, list[int]]:
    """Of each rule, by width."""
    by_share = {f"delta_{share}": [capacity(delta(share), d) for d in WIDTHS] for share in SHARES}
    rules = {"hebbian": hebbian, "softmax": softmax}
    return {name: [capacity(rule, d) for d in WIDTHS] for name, rule in rules.items()} | by_share


def measure() -> Measured:
    with threads(1):
        stored = capacities()
    stored["delta"] = [max(row) for row in zip(*(stored[f"delta_{share}"] for share in SHARES), strict=True)]
    rate = slope(WIDTHS, stored["hebbian"])
    more = all(
        n >= least
        for name in ("delta", "softmax")
        for n, least in zip(stored[name], stored["hebbian"], strict=True)
    )
    numbers = {"widths": list(WIDTHS), "slope": rate, "slope_delta": slope(WIDTHS, stored["delta"]), **stored}
    return Measured.by({"slope": abs(rate - 1) <= 0.15, "stores more": more}, numbers)


CLAIM = Claim(
    name="pavlovian_attention",
    statement=(
        "the number of random associations that Hebbian linear attention retrieves at a fixed error grows linearly "
        "with the width of the keys; the delta rule and softmax store at least as many at every width"
    ),
    bound=(
        "slope of log n* over log d within 1 ± 0.15 for d from 16 to 256, n* the most pairs at a mean cosine of at "
        "least 1/√2; n* of delta rule and of softmax >= Hebbian n* at every width"
    ),
    measure=measure,
)
