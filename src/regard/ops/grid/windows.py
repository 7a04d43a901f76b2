"""Windows of an image with nothing around it: which places each of them holds, the tokens that stand there, and back.

>>> at = window_places((2, 3), (2, 2), (1, 2), ((1, 0), (0, 1)))  # a row of nothing above, a column of it behind
>>> at.tolist()
[[-1, -1, 0, 1], [-1, -1, 2, -1], [0, 1, 3, 4], [2, -1, 5, -1]]
>>> windows(torch.arange(1.0, 7).view(1, 6, 1), at)[0, :, :, 0].tolist()
[[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 0.0], [1.0, 2.0, 4.0, 5.0], [3.0, 0.0, 6.0, 0.0]]
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.grid.near import gathered, given_back, places, product

PerAxis = Sequence[int]


def window_places(
    sides: PerAxis, kernel: PerAxis, stride: PerAxis, padding: Sequence[tuple[int, int]], device: Any = None
) -> Tensor:
    """[T, W] the number of each place of each window, row by row; -1 where the window reaches beyond the image.

    On each axis a window has `kernel` places and begins `stride` after the one before it; `padding` says how many
    places there are before the image and behind it. There are as many windows as fit.
    """
    lines, there = [], []
    for side, size, step, (before, behind) in zip(sides, kernel, stride, padding, strict=True):
        first = torch.arange(-before, side + behind - size + 1, step, device=device)
        line = first[:, None] + torch.arange(size, device=device)
        lines.append(line)
        there.append((line >= 0) & (line < side))
    return places(lines, tuple(sides)).masked_fill(~product(there, 1), -1)


def windows(x: Tensor, at: Tensor) -> Tensor:
    """[M, T, W, C] tokens of x [M, N, C] at the places [T, W]; zeros where a place is -1."""
    row_of_zeros = F.pad(x, (0, 0, 0, 1))
    return gathered(row_of_zeros, at.masked_fill(at < 0, x.shape[1]))


def from_windows(x: Tensor, at: Tensor, tokens: int) -> Tensor:
    """[M, N, C] of windows [M, T, W, C] that hold each of the N places once; -1 is left out."""
    return given_back(x, at.flatten().argsort(stable=True)[at.numel() - tokens :])
