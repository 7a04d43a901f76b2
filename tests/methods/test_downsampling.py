"""Downsampling and the uniform grid: the cells that they share."""

import torch
from torch.nn.functional import avg_pool2d

from regard.methods.tokens import downsampling, uniform_grid


def test_it_is_average_pooling_where_the_cells_are_even():
    x = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
    _, means = downsampling.measure(x, (8, 6), downsampling.Config(keep=12))
    pooled = avg_pool2d(x.T.reshape(1, 5, 8, 6), 2)[0].flatten(1).T
    torch.testing.assert_close(means, pooled)


def test_every_token_lies_in_one_cell_and_cells_stand_where_the_uniform_grid_keeps():
    for rows, columns in ((1, 1), (3, 7), (8, 8), (12, 2)):
        for count in range(1, rows * columns + 1):
            cell, middle = downsampling.cells(rows, columns, count)
            assert torch.equal(cell[middle], torch.arange(count))
            assert bool((cell.bincount(minlength=count) > 0).all()) and bool((middle.diff() > 0).all())
            kept = uniform_grid.measure((rows, columns), uniform_grid.Config(keep=count))
            assert torch.equal(kept, middle)


def test_bfloat16_is_averaged_in_float32():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    means = downsampling.measure(x, (8, 8), downsampling.Config(keep=4))[1]
    assert means.dtype == torch.bfloat16
    assert torch.equal(
        means, downsampling.measure(x.float(), (8, 8), downsampling.Config(keep=4))[1].bfloat16()
    )
