"""Hashes of directions: the sides of random hyperplanes on which a vector lies, ordered so that the near stay near."""

import torch
from torch import Tensor


def gray_rank(signs: Tensor) -> Tensor:
    """[...] where the patterns signs [..., r] bool stand in Gray order, in which neighbours differ in one bit.

    >>> gray_rank(torch.tensor([[False, False], [True, False], [True, True], [False, True]]))
    tensor([0, 1, 2, 3])
    """
    count = signs.shape[-1]
    code = (signs.long() << torch.arange(count, device=signs.device)).sum(-1)
    shift = 1
    while shift < count:  # bit b becomes the parity of all bits from b on
        code = code ^ (code >> shift)
        shift *= 2
    return code
