"""Keys and values in less memory than their numbers take: codes of few bits, channels or numbers left out.

A `Codec` says how tokens are packed and unpacked. What it makes of tokens are tensors with a slot for each, so that any
of them can go later without a second rounding, and tensors that slots share.

>>> x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
>>> scale, zero = scales(x, bits=2, dim=-1)
>>> codes = coded(x, scale, zero, bits=2)
>>> codes, float(scale), float(zero)
(tensor([[228]], dtype=torch.uint8), 1.0, 0.0)
>>> restored(codes, scale, zero, bits=2)
tensor([[0., 1., 2., 3.]])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Codec:
    """How keys and values of old tokens are stored.

    pack      (k [B, g, m, D], v [B, g, m, E], shared, told) -> (slots, shared): slots [B, g, m, ...] by name, one entry
              for each token; shared [B, g, c, ...], what they have in common: c entries more than before, or none.
              `told` are tensors [B, g, ...] that the page's `observe` left in view.memory
    unpack    (slots, shared, chunk [B, g, n] or None) -> (k, v); `chunk` says from which chunk of `chunk` tokens a slot
              is, None: slot i is of chunk i // chunk
    chunk     tokens are packed in multiples of so many, in the order of the text
    residual  newest tokens of each row that stay as they are
    method    (name, settings) of the method that stores so: how a saved cache finds it again
    """

    pack: Callable[[Tensor, Tensor, Parts, Parts], tuple[Parts, Parts]]
    unpack: Callable[[Parts, Parts, Tensor | None], tuple[Tensor, Tensor]]
    chunk: int
    residual: int
    method: tuple[str, dict[str, Any]]


def scales(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) in x's dtype: equal steps from the least to the largest along `dim`, which stays with size 1."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return ((high.float() - low.float()) / (2**bits - 1)).to(x.dtype), low


def coded(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """uint8 [..., d * bits / 8] of x [..., d]: the nearest step of each number; d * bits is a multiple of 8."""
    steps = (x.float() - zero.float()) / torch.where(scale == 0, 1, scale).float()
    return packed_bits(steps.round().clamp(0, 2**bits - 1).to(torch.uint8), bits)


def restored(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x [..., d] of its codes, in the dtype of the scale."""
    return (unpacked_bits(codes, bits).float() * scale.float() + zero.float()).to(scale.dtype)


def packed_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., d] of codes below 2 ** bits -> [..., d * bits / 8], the first in the lowest bits."""
    each = 8 // bits
    places = torch.arange(0, 8, bits, device=codes.device)
    return (codes.unflatten(-1, (-1, each)).int() << places).sum(-1).to(torch.uint8)


def unpacked_bits(codes: Tensor, bits: int) -> Tensor:
    """The inverse of packed_bits."""
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return ((codes[..., None] >> places) & (2**bits - 1)).flatten(-2)


def marked_bits(marks: Tensor) -> Tensor:
    """bool [..., d] as bytes [..., ceil(d / 8)]."""
    return packed_bits(F.pad(marks.to(torch.uint8), (0, -marks.shape[-1] % 8)), 1)
