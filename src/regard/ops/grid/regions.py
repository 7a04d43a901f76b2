"""A grid cut into regions of one size, side by side: the tokens of each together, and back.

Windows are regions of a given size; S x S regions are those of size (height / S, width / S). Regions are counted row by
row, and so are the places of each.

>>> import torch
>>> at = to_regions(torch.arange(24).view(24, 1), (4, 6), (2, 3))
>>> at.shape, at[1].flatten().tolist()
(torch.Size([4, 6, 1]), [3, 4, 5, 9, 10, 11])
>>> from_regions(at, (4, 6), (2, 3)).flatten().tolist() == list(range(24))
True
"""

from torch import Tensor

from regard.core.errors import require


def to_regions(x: Tensor, sides: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """[..., R, p, D] of tokens [..., N, D] of a grid: R regions, p places of each."""
    axes = len(check_size(sides, size))
    x = x.unflatten(-2, [n for side, s in zip(sides, size, strict=True) for n in (side // s, s)])
    first = x.dim() - 1 - 2 * axes  # the axis of the first number of regions; the next is that of its places
    regions, places = ([first + 2 * axis + inner for axis in range(axes)] for inner in (0, 1))
    x = x.permute(*range(first), *regions, *places, -1)
    return x.flatten(-1 - axes, -2).flatten(-2 - axes, -3)


def from_regions(x: Tensor, sides: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """[..., N, D], row by row, of regions [..., R, p, D]."""
    axes = len(check_size(sides, size))
    x = x.unflatten(-2, size).unflatten(-2 - axes, [side // s for side, s in zip(sides, size, strict=True)])
    first = x.dim() - 1 - 2 * axes
    order = [first + axis + inner for axis in range(axes) for inner in (0, axes)]
    return x.permute(*range(first), *order, -1).flatten(-1 - 2 * axes, -2)


def check_size(sides: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """The size; ValueError where regions of it do not fill the grid."""
    fill = len(size) == len(sides) and all(s >= 1 and side % s == 0 for side, s in zip(sides, size))
    require(fill, "regions fill the grid: their size divides its sides", size=size, sides=sides)
    return size
