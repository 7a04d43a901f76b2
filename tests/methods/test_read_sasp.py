"""Points of a map: what they carry a gradient of, where they move, which come first."""

import pytest
import torch

from regard.methods.tracing import read_sasp as page

GRID, SIZE = (4, 4), (12, 12)


def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 16, 5, generator=g, dtype=torch.float64), torch.randn(
        2, 5, generator=g, dtype=torch.float64
    )


def test_points_pass_gradients_to_both_states():
    image, answer = (x.requires_grad_() for x in states())
    page.measure(image, answer, GRID, SIZE).points.sum().backward()
    assert image.grad.abs().max() > 0 and answer.grad.abs().max() > 0


def test_positive_points_move_towards_the_peak():
    ramp = torch.arange(16.0).view(1, 16, 1)
    found = page.measure(ramp, torch.ones(1, 1), GRID, (40, 40), page.Config(points=1, smooth=1))
    # the last cell's centre is pixel 35, away from the border; the map is lower to the left and above
    assert found.labels.tolist() == [[1]]
    assert (found.points[0, 0] > 35).all() and (found.points[0, 0] < 36).all()


def test_with_enough_positive_points_there_is_no_negative():
    image, answer = states()
    cfg = page.Config(positive=0.3, points=3, smooth=1)
    assert (page.measure(image, answer, GRID, SIZE, cfg).labels == 1).all()
    full = page.measure(image, answer, GRID, SIZE, page.Config(smooth=1)).labels
    rank = torch.tensor([1, 2, 0])[full]  # -1 is last: positive, negative, neither
    order = torch.where(rank == 2, 0, torch.where(rank == 1, 1, 2))
    assert full.shape == (2, 16) and (order.diff(dim=1) >= 0).all()


def test_a_grid_that_does_not_fit_is_refused():
    image, answer = states()
    with pytest.raises(ValueError, match="each cell of the grid"):
        page.measure(image, answer, (4, 5), SIZE)
    with pytest.raises(ValueError, match="negative < positive"):
        page.Config(positive=0.1)
