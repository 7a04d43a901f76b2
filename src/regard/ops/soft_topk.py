"""The k best of n, softly: sigmoids around a bar that lies between the last that is kept and the first that is not.

    m_i = σ((s_i - bar) / τ),    bar = (s_(k) + s_(k+1)) / 2 of scores in falling order;    m = 1 where all are kept

The lower τ, the nearer to the marks of `ops.best`. Gradients go through scores and bar alike: what raises one of the
two beside it makes room scarcer for all.

>>> log_mask(torch.tensor([0.0, 1.0, 2.0, 3.0]), 2, 4, 1.0).exp()
tensor([0.1824, 0.3775, 0.6225, 0.8176])
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kept(share: float, n: int) -> int:
    """How many of n are a share of them: rounded down, one at least."""
    return max(int(share * n + 1e-9), 1) if n else 0


def kept_of(share: float, n: Tensor) -> Tensor:
    """The same of whole numbers."""
    return torch.where(n > 0, (share * n.double() + 1e-9).long().clamp(min=1), 0)


def log_mask(score: Tensor, count: Tensor | int, there: Tensor | int, temperature: float) -> Tensor:
    """log m of scores [..., n], `count` kept of so many that are there; those that are not say -inf, and get a number.

    `count` and `there` are whole numbers or tensors of them, broadcastable to score.shape[:-1].
    """
    count, there = (torch.as_tensor(t, device=score.device).expand(score.shape[:-1]) for t in (count, there))
    whole = (count >= there)[..., None]
    order = F.pad(score.sort(-1, descending=True).values, (0, 1))
    last = torch.where(whole, 0, (count - 1).clamp(min=0)[..., None])
    bar = (order.gather(-1, last) + order.gather(-1, last + 1)) / 2
    # both are finite where they are read, so that gradients are
    score, bar = torch.where(whole | (score == -torch.inf), 0, score), torch.where(whole, 0, bar)
    return torch.where(whole, 0, F.logsigmoid((score - bar) / temperature))


def slow_mask(score: Tensor, share: float, temperature: float | None) -> Tensor:
    """m of scores [n], of which a share is kept; without a temperature 0 and 1."""
    n, k = len(score), kept(share, len(score))
    order = sorted(range(n), key=lambda i: (-score[i].item(), i))
    if k == n:
        return torch.ones_like(score)
    if temperature is None:
        return torch.tensor([float(i in order[:k]) for i in range(n)], dtype=score.dtype, device=score.device)
    bar = (score[order[k - 1]] + score[order[k]]) / 2
    return 1 / (1 + ((bar - score) / temperature).exp())
