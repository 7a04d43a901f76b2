"""Feature maps of linear attention that two or more pages share: positive, so that weights are; and tokens added."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, per channel: e^x below zero, x + 1 above (Transformers are RNNs, 2020)."""
    return F.elu(x) + 1


def taylor(x: Tensor, degree: int = 2) -> Tensor:
    """Features [..., 1 + D + D² + ... + D^degree] whose product is Σ_p (x·y)^p / p!, the Taylor series of e^{x·y}.

    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    >>> round(float(taylor(x, 2) @ taylor(y, 2)), 5)  # 1 - 1.5 + 1.5² / 2
    0.625
    """
    parts, power = [torch.ones_like(x[..., :1])], torch.ones_like(x[..., :1])
    for p in range(1, degree + 1):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
        parts.append(power / math.sqrt(math.factorial(p)))
    return torch.cat(parts, dim=-1)


def pad_tokens(t: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """t [..., n, D] with zeros for tokens before and after; t itself where there are none to add.

    torch.compile takes padding by nothing for a dense copy, and torch keeps the strides: what then views it fails.
    """
    return F.pad(t, (0, 0, before, after)) if before or after else t
