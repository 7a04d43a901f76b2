"""Downsampling: the image's tokens averaged over the cells of a coarser grid. Nothing is dropped, detail is lost.

    y_c = 1/|c| Σ_{p ∈ c} x_p,  standing where the middle token of cell c stood, of two the earlier
    a = the number of rows of cells nearest to √(k R / C);  row i of a has ⌊k (i + 1) / a⌋ - ⌊k i / a⌋ cells

where x are the projected features on a grid of R rows and C columns, c the cells, a part of the grid each so that
every token counts once, and k the budget, which is met exactly. Where a divides both R and k this is average pooling.

>>> import torch
>>> x = torch.arange(16.0)[:, None]  # four cells of 2 x 2: (0 + 1 + 4 + 5) / 4 and so on
>>> [part.flatten().tolist() for part in measure(x, (4, 4), Config(keep=0.25))]
[[0, 2, 8, 10], [2.5, 4.5, 10.5, 12.5]]
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
    keep: float | int = 0.25  # cells for each image: a share of its tokens, or a number

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def part_of(size: int, parts: Tensor | int) -> tuple[Tensor, Tensor]:
    """[size] in which of the parts each place of a line lies, and the middle of that part, of two the earlier."""
    part = ((torch.arange(size) + 1) * parts - 1) // size
    first, past = part * size // parts, (part + 1) * size // parts
    return part, (first + past - 1) // 2


def cells(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """[P] the cell of each token, and [count] the token in the middle of each cell."""
    taken = grid_rows(rows, columns, count)
    row, row_middle = part_of(rows, taken)
    first, past = row * count // taken, (row + 1) * count // taken  # cells before and up to this row of them
    column, column_middle = part_of(columns, (past - first)[:, None])
    cell = (first[:, None] + column).flatten()
    middle = (row_middle[:, None] * columns + column_middle).flatten()
    return cell, torch.empty(count, dtype=torch.long).scatter_(0, cell, middle)


def measure(features: Tensor, grid: tuple[int, int], cfg: Config | None = None) -> tuple[Tensor, Tensor]:
    """[k] where the cells stand, and [k, d] their means, of features [P, d]."""
    cfg, wide = cfg or Config(), features if features.dtype == torch.float64 else features.float()
    cell, middle = (t.to(features.device) for t in cells(*grid, count_of(cfg.keep, len(features))))
    sums = wide.new_zeros(len(middle), wide.shape[1]).index_add_(0, cell, wide)
    return middle, (sums / cell.bincount(minlength=len(middle))[:, None]).to(features.dtype)


def before(images: Images, cfg: Config) -> list[Reduced]:
    def of(view: ImageView) -> Reduced:
        return Reduced(*measure(view.features, view.grid or (1, view.tokens), cfg))

    return [of(view) for view in images]


def reference(features: Tensor, grid: tuple[int, int], cfg: Config | None = None) -> tuple[Tensor, Tensor]:
    """By the definition: the nearest number of rows of all that are possible, each cell's members listed."""
    (rows, columns), given, cfg = grid, features.double().tolist(), cfg or Config()
    count = count_of(cfg.keep, rows * columns)
    possible = [a for a in range(1, min(rows, count) + 1) if a * columns >= count]
    a = min(reversed(possible), key=lambda a: abs(a - math.sqrt(count * rows / columns)))
    middles, means = [], []
    for i in range(a):
        tall = range(i * rows // a, (i + 1) * rows // a)
        n = count * (i + 1) // a - count * i // a
        for j in range(n):
            wide = range(j * columns // n, (j + 1) * columns // n)
            members = [given[y * columns + x] for y in tall for x in wide]
            means.append([math.fsum(values) / len(members) for values in zip(*members, strict=True)])
            middles.append(tall[(len(tall) - 1) // 2] * columns + wide[(len(wide) - 1) // 2])
    return torch.tensor(middles), torch.tensor(means, dtype=torch.float64)


def cases(seed: int) -> Iterable[tuple]:
    """Square grids and long ones, a line, one token, all tokens, and budgets that are no product; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int, keep: float) -> tuple:
        return (
            torch.randn(rows * columns, 3, generator=g, dtype=torch.float64),
            (rows, columns),
            Config(keep=keep),
        )

    for rows, columns, keep in ((8, 8, 0.25), (8, 8, 7), (1, 13, 0.3), (17, 1, 5), (1, 1, 0.1), (5, 7, 1.0)):
        yield drawn(rows, columns, keep)
    features, *rest = drawn(6, 4, 5)
    yield features.float(), *rest
    for _ in range(4):
        rows, columns = torch.randint(1, 12, (2,), generator=g).tolist()
        yield drawn(rows, columns, int(torch.randint(1, rows * columns + 1, (), generator=g)))


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3},),
    card=Card(
        title="Downsampling",
        paper="none: a control",
        year=2024,
        idea="the image's tokens are averaged over the cells of a coarser grid",
        cost="P·d additions; the decoder reads k tokens for P",
        needs=("vision-language model",),
        lineage=("uniform_grid",),
        neutral={"keep": 1.0},
        caveat="features are averaged after the projector, where benchmarks also shrink the picture before the tower; "
        "rows of cells may hold different numbers of them, so that the budget is met exactly",
    ),
)
