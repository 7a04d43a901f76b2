"""A budget shared in proportion to weights between bounds, in whole numbers that sum to it exactly.

q_i = clip(λ w_i, low_i, high_i) with Σ q_i = budget        rounded down, then one more by the largest remainders
"""

import math

import torch
from torch import Tensor


def shares(weights: Tensor, low: Tensor, high: Tensor, budget: int) -> Tensor:
    """[F] whole numbers that sum to the budget, of weights [F] >= 0 and bounds [F] that the budget lies between.

    A weight of 0 gets more than its lower bound only where the others are full.

    >>> half = torch.full((3,), 0.5)
    >>> shares(torch.tensor([6.0, 3.0, 0.0]), 2 * half, 100 * half, 20)  # 19 by 2 : 1 beside the 1 of the last
    tensor([13,  6,  1])
    """
    weights, low, high = weights.double(), low.double(), high.double()
    weights = weights.clamp(min=1e-9 * weights.max()) if weights.any() else torch.ones_like(weights)
    exact = (level(weights, low, high, budget) * weights).clamp(low, high)
    whole = (exact + 1e-9).floor()
    rest = ((exact - whole) * 1e9).round()
    more = rest.argsort(descending=True, stable=True)[: budget - int(whole.sum())]
    whole[more] += 1
    return whole.long()


def level(weights: Tensor, low: Tensor, high: Tensor, budget: int) -> Tensor:
    """λ with Σ clip(λ w, low, high) = budget: the sum is straight between the λ at which a share meets a bound."""
    edges = torch.cat([low / weights, high / weights]).sort().values
    totals = (edges[:, None] * weights).clamp(low, high).sum(1)
    above = int((totals < budget).sum())
    if above in (0, len(edges)):
        return edges[min(above, len(edges) - 1)]
    part = (budget - totals[above - 1]) / (totals[above] - totals[above - 1])
    return torch.lerp(edges[above - 1], edges[above], part)


def slow_shares(weights: list[int], high: list[int], budget: int) -> list[int]:
    """The same with lower bounds of 1, by a λ that bisection finds; plainly, for references."""
    weights = [max(n, 1e-9 * max(weights)) if any(weights) else 1.0 for n in weights]
    least, most = 0.0, 2 * sum(high) / min(weights)

    def shared(size: float) -> list[float]:
        return [min(max(size * w, 1), p) for w, p in zip(weights, high, strict=True)]

    for _ in range(300):
        middle = (least + most) / 2
        least, most = (middle, most) if sum(shared(middle)) < budget else (least, middle)
    exact = shared(most)
    given = [math.floor(n + 1e-7) for n in exact]
    while sum(given) < budget:
        given[max(range(len(given)), key=lambda i: round(exact[i] - given[i], 7))] += 1
    return given
