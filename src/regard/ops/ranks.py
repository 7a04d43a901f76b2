"""Ranks with ties, and Spearman's correlation of them, along the last axis."""

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """[..., n] ranks from 1; equal numbers share the mean of theirs.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    ascending = x.sort(-1).values.contiguous()
    below, upto = (torch.searchsorted(ascending, x.contiguous(), right=right) for right in (False, True))
    return (below + upto + 1) / 2


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """[...] Spearman's of a, b [..., n], float64; NaN where one of them is the same everywhere.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0]))
    tensor(-1., dtype=torch.float64)
    """
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a).double(), ranks(b).double()))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
