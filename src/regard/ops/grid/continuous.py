"""Continuous position biases (log-CPB): an MLP of the steps from a place to the middle of an average.

Steps on an axis are counted so that a whole axis is 8, and go in as their logarithm: sign · log2(1 + |steps|) / log2 8.
So images of any size can be asked. Few steps differ: the MLP is asked once for each, and looked up.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SPAN = 8.0  # steps over a whole axis, whose logarithm is about 1


def steps_of(side: int, count: int, by: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """All steps from a place of an axis to an average, scaled, [S]; and which of them each pair has, [side, count].

    The averages are those of adaptive pooling; `by` is the side by which steps are counted.
    """
    j = torch.arange(count, device=like.device)
    begin, end = j * side // count, -(-(j + 1) * side // count)
    # twice the steps, which are whole or halves; of averages of equal parts all are one or the other
    twice = 2 * torch.arange(side, device=like.device)[:, None] - (begin + end - 1)
    most, each = 2 * side - 1 - -(-side // count), 2 if side % count == 0 else 1
    steps = torch.arange(-most, most + 1, each, device=like.device).to(like.dtype) / 2
    part = steps / max(1, by - 1) * SPAN
    return part.sign() * (1 + part.abs()).log2() / math.log2(SPAN), (twice + most) // each


def continuous_bias(
    mlp: Callable[[Tensor], Tensor],
    sides: tuple[int, ...],
    counts: tuple[int, ...],
    by: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """[H, N, P] biases of N places to P averages, by an MLP [.., 2] -> [.., H] of their steps on y and x."""
    lines, index = zip(*(steps_of(*each, like) for each in zip(sides, counts, by, strict=True)), strict=True)
    bias = mlp(torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1))  # [steps of y, of x, H]
    at = index[0][:, None, :, None] * len(lines[1]) + index[1][None, :, None]  # [y, x, P of y, P of x]
    # as an embedding, whose gradient is many times quicker than that of an index
    return F.embedding(at, bias.flatten(0, 1)).flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def cells(sides: tuple[int, ...], counts: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Rows and columns that each average of adaptive pooling is of: the definition."""
    spans = [
        [slice(j * side // count, -(-(j + 1) * side // count)) for j in range(count)]
        for side, count in zip(sides, counts, strict=True)
    ]
    return [(rows, columns) for rows in spans[0] for columns in spans[1]]


def steps_to(
    sides: tuple[int, ...], counts: tuple[int, ...], by: tuple[int, ...]
) -> list[list[tuple[float, float]]]:
    """[N, P, 2]: the scaled steps on y and x from each place to the middle of each average, the definition.

    >>> [round(y, 4) for y, x in steps_to((4, 4), (2, 2), (4, 4))[0]]  # -0.5/3·8 = -4/3, -log2(7/3)/3
    [-0.4075, -0.4075, -0.9795, -0.9795]
    """
    middles = [[(span.start + span.stop - 1) / 2 for span in both] for both in cells(sides, counts)]
    places = [divmod(i, sides[1]) for i in range(sides[0] * sides[1])]
    return [[(scaled(y - a, by[0]), scaled(x - b, by[1])) for a, b in middles] for y, x in places]


def scaled(steps: float, by: int) -> float:
    part = steps / max(1, by - 1) * SPAN
    return math.copysign(math.log2(1 + abs(part)) / math.log2(SPAN), part)
