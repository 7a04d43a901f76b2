"""How much of a cache a layer asks for: how far its attention spreads, and how much it moves from query to query.

    H = - Σ_t Σ_j a_tj log a_tj        V = Σ_j Var_t(a_tj)        P = H^(1/τ₁) V^(1/τ₂)

over the last queries t of a prompt and the tokens j before them, summed over the heads of the layer.
"""

import torch
from torch import Tensor

from regard.ops.observed import by_query_head
from regard.ops.shares import shares
from regard.ops.view import View

SPREAD, MOTION = "spread of layer {}", "motion of layer {}"


def spread_and_motion(weights: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """([B] H, [B] V) of weights [B, H, r, m], of which the rows `there` [1|B, r] count.

    >>> w = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])  # one head looks at two tokens, then at one
    >>> spread_and_motion(w, torch.ones(1, 2, dtype=torch.bool))  # 2 * 0.5 log 2; 0.125 + 0.125
    (tensor([0.6931], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    weights = weights.double()
    spread = -torch.special.xlogy(weights, weights).sum((1, 2, 3))
    return spread, variance(weights, there).sum((1, 2))


def variance(weights: Tensor, there: Tensor) -> Tensor:
    """[B, H, m] over the rows that are there of weights [B, H, r, m], of which the others are zero; of one row 0."""
    count = there.sum(-1)[:, None, None]
    mean = weights.sum(2) / count
    away = (weights - mean[:, :, None]) * there[:, None, :, None]
    return away.square().sum(2) / (count - 1).clamp(min=1)


def note_preference(view: View, window: int, weights: Tensor, there: Tensor) -> None:
    """Hand on what the heads of this view add to the H and V of their layer, of what `observed` gave of the window."""
    before = view.hold() & (view.age() >= window)
    for name, part in zip((SPREAD, MOTION), spread_and_motion(weights * by_query_head(view, before), there)):
        name = name.format(view.layer)
        view.shared[name] = part + view.shared[name] if name in view.shared else part


def by_preference(view: View, score: Tensor, spread: float, motion: float) -> Tensor:
    """[B, heads] tokens of the heads of all layers, of marked scores [B, heads, n]: what they have together is shared
    by P = H^(1/spread) V^(1/motion) beside the tokens that stay anyhow, and no layer gets more than it holds.
    """
    layers = sorted(set(view.head_layers))
    first = [view.head_layers.index(layer) for layer in layers]
    whose = torch.tensor([layers.index(layer) for layer in view.head_layers], device=score.device)
    H, V = (torch.stack([view.shared[n.format(i)] for i in layers], -1) for n in (SPREAD, MOTION))  # [B, L]
    wanted = H ** (1 / spread) * V ** (1 / motion)
    held, sure = (score > -torch.inf).sum(-1), (score == torch.finfo(score.dtype).max).sum(-1)  # [B, heads]
    most = lambda x: torch.stack([x[:, whose == i].amax(-1) for i in range(len(layers))], -1)  # noqa: E731
    budget, held = view.budget[:, first], most(held)
    sure = most(sure).minimum(budget)
    room = held - sure
    rest = (budget - sure).sum(-1).minimum(room.sum(-1))
    zero = torch.zeros_like(room[0])
    parts = [shares(w, zero, r, int(n)) for w, r, n in zip(wanted, room, rest, strict=True)]
    return (sure + torch.stack(parts).to(sure.device))[:, whose]
