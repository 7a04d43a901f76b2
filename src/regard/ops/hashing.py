"""Hashes: of directions, ordered so that the near stay near, and of whole numbers, which are random draws."""

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


def uniform(*numbers: Tensor | int) -> Tensor:
    """[...] a draw from [0, 1) for whole numbers that are broadcast: the same for the same, on every machine.

    What a token draws then depends on neither the batch, nor padding, nor on what was drawn before.

    >>> uniform(0, torch.tensor([0, 1, 2]))
    tensor([0.6134, 0.7850, 0.7330])
    """
    code = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        code = mixed((code * 0x9E3779B1 + number + 1) & 0xFFFFFFFF)
    return (code >> 8).float() / 2**24  # 24 bits, which float32 holds exactly


def mixed(code: Tensor) -> Tensor:
    """[...] of 32 bits: every bit of the result depends on all of `code` (the last steps of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        code = ((code ^ (code >> shift)) * factor) & 0xFFFFFFFF
    return code ^ (code >> 16)
