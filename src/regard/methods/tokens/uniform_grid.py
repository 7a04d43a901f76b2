"""Uniform grid: visual tokens at even distances. Chosen without a look at the image, it misses no region of it.

    a = the number of rows nearest to √(k R / C)        so that cells are about as high as they are wide
    row i of a takes n_i = ⌊k (i + 1) / a⌋ - ⌊k i / a⌋ tokens; each is the middle of its cell, of two the earlier

where R and C are the rows and columns of the image's tokens and k the budget, which is met exactly. Cells are those
of `downsampling`, which keeps their means in the place of their middles. Tokens on no grid count as one row.

>>> measure((4, 4), Config(keep=0.25))  # four cells of 2 x 2: rows 0 and 2, columns 0 and 2
tensor([ 0,  2,  8, 10])
>>> measure((2, 6), Config(keep=3))  # a = 1: one row of three
tensor([0, 2, 4])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.tokens import TokensPage
from regard.ops.images import Images, ImageView, Reduced, count_of, grid_rows


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of each image's tokens that stay

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def middles(size: int, parts: int) -> Tensor:
    """[parts] the middle of each of so many parts of a line of `size`, of two the earlier."""
    edges = torch.arange(parts + 1) * size // parts
    return (edges[:-1] + edges[1:] - 1) // 2


def measure(grid: tuple[int, int], cfg: Config | None = None) -> Tensor:
    """[k] numbers of the tokens that stay, ascending, of a grid (rows, columns)."""
    (rows, columns), cfg = grid, cfg or Config()
    count = count_of(cfg.keep, rows * columns)
    taken = grid_rows(rows, columns, count)
    shares = (torch.arange(taken + 1) * count // taken).diff().tolist()
    lines = zip(middles(rows, taken).tolist(), shares, strict=True)
    return torch.cat([row * columns + middles(columns, share) for row, share in lines])


def before(images: Images, cfg: Config) -> list[Reduced]:
    def of(view: ImageView) -> Reduced:
        return Reduced(measure(view.grid or (1, view.tokens), cfg).to(view.features.device))

    return [of(view) for view in images]


def reference(grid: tuple[int, int], cfg: Config | None = None) -> Tensor:
    """By the definition: the nearest number of rows of all that are possible, each cell's members listed."""
    (rows, columns), cfg = grid, cfg or Config()
    count = count_of(cfg.keep, rows * columns)
    possible = [a for a in range(1, min(rows, count) + 1) if a * columns >= count]
    a = min(reversed(possible), key=lambda a: abs(a - math.sqrt(count * rows / columns)))
    kept = []
    for i in range(a):
        tall = [y for y in range(rows) if i * rows // a <= y < (i + 1) * rows // a]
        n = count * (i + 1) // a - count * i // a
        for j in range(n):
            wide = [x for x in range(columns) if j * columns // n <= x < (j + 1) * columns // n]
            kept.append(tall[(len(tall) - 1) // 2] * columns + wide[(len(wide) - 1) // 2])
    return torch.tensor(kept)


def cases(seed: int) -> Iterable[tuple]:
    """Square grids and long ones, a line, one token, all tokens, and budgets that are no product."""
    g = torch.Generator().manual_seed(seed)
    yield ((24, 24),)
    yield (8, 8), Config(keep=7)
    yield (1, 13), Config(keep=0.3)
    yield (17, 1), Config(keep=5)
    yield (1, 1), Config(keep=0.1)
    yield (5, 7), Config(keep=1.0)
    for _ in range(6):
        rows, columns = torch.randint(1, 12, (2,), generator=g).tolist()
        yield (rows, columns), Config(keep=int(torch.randint(1, rows * columns + 1, (), generator=g)))


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3},),
    card=Card(
        title="Uniform grid",
        paper="none: a control",
        year=2024,
        idea="visual tokens stay at even distances, whatever the image shows",
        cost="nothing; the decoder reads k tokens for P",
        needs=("vision-language model",),
        lineage=("random_tokens",),
        neutral={"keep": 1.0},
        caveat="rows of cells may hold different numbers of them, so that the budget is met exactly",
    ),
)
