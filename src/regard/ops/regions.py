"""Connected regions of a grid, and pictures stretched to another size: in tensors, and plainly for references."""

import torch
from torch import Tensor
from torch.nn import functional as F


def regions(mask: Tensor) -> Tensor:
    """[H, W] a number for each connected region, pixels that share an edge together, and 0 outside."""
    rows, columns = mask.shape
    labels = torch.arange(1, rows * columns + 1, device=mask.device).double().view(mask.shape) * mask
    while True:
        tall, wide = (F.max_pool2d(labels[None], k, 1, p)[0] for k, p in (((3, 1), (1, 0)), ((1, 3), (0, 1))))
        grown = torch.maximum(tall, wide) * mask
        # a number is a pixel's own: take over what that pixel has come to
        grown = F.pad(grown.flatten(), (1, 0))[grown.long()]
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, *size] of [C, h, w], bilinear between the centres of pixels."""
    return F.interpolate(picture[None], size, mode="bilinear", align_corners=False)[0]


def stretched(picture: list, height: int, width: int) -> list:
    """Each new pixel from the old ones whose centres are less than one old pixel away, both ways."""

    def near(i: int, count: int, old: int) -> list[tuple[int, float]]:
        at = min(max((i + 0.5) * old / count - 0.5, 0.0), old - 1.0)
        return [(j, 1 - abs(j - at)) for j in range(old) if abs(j - at) < 1]

    rows = [near(r, height, len(picture)) for r in range(height)]
    columns = [near(c, width, len(picture[0])) for c in range(width)]
    return [[sum(u * v * picture[i][j] for i, u in y for j, v in x) for x in columns] for y in rows]


def flooded(weight: list, least: float) -> list[set]:
    """The regions of pixels of this weight or more, in the order of their last pixels."""
    left = {(r, c) for r, row in enumerate(weight) for c, x in enumerate(row) if x >= least}
    found = []
    while left:
        region, edge = set(), [max(left)]
        while edge:
            r, c = edge.pop()
            if (r, c) in left:
                left.remove((r, c))
                region.add((r, c))
                edge += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        found.append(region)
    return found[::-1]


def shrunk(m: list[list[float]], rows: int, columns: int) -> list[list[float]]:
    """Means of cells from floor to ceiling."""

    def cell(i: int, count: int, size: int) -> range:
        return range(i * size // count, -(-(i + 1) * size // count))

    def mean(i: int, j: int) -> float:
        own = [m[y][x] for y in cell(i, rows, len(m)) for x in cell(j, columns, len(m[0]))]
        return sum(own) / len(own)

    return [[mean(i, j) for j in range(columns)] for i in range(rows)]
