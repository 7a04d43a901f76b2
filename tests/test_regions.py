"""Regions of a grid against their definition, place by place, on one, two and three axes."""

import math

import pytest
import torch

from regard.ops.grid import from_regions, to_regions

GRIDS = (
    ((12,), (4,)),
    ((4, 6), (2, 3)),
    ((6, 4), (2, 4)),
    ((2, 4, 6), (1, 2, 3)),
    ((3, 5), (3, 5)),
    ((3, 2), (1, 1)),
)


def places(sides, size):
    """The places of each region, both in the order of a sum over coordinates."""
    at = torch.cartesian_prod(*(torch.arange(side) for side in sides)).view(-1, len(sides))
    found = {}
    for place, where in enumerate(at.tolist()):
        found.setdefault(tuple(x // s for x, s in zip(where, size, strict=True)), []).append(place)
    return [found[region] for region in sorted(found)]


@pytest.mark.parametrize(("sides", "size"), GRIDS)
def test_regions_hold_their_places_in_order_and_go_back(sides, size):
    x = torch.randn(2, 3, math.prod(sides), 5)
    wanted = x[:, :, places(sides, size)]  # [2, 3, R, p, 5]
    found = to_regions(x, sides, size)
    assert torch.equal(found, wanted)
    assert torch.equal(to_regions(x[0, 0], sides, size), wanted[0, 0])
    assert torch.equal(from_regions(found, sides, size), x)
    assert torch.equal(from_regions(found[0, 0], sides, size), x[0, 0])


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (0, 2), (2,)])
def test_regions_that_do_not_fill_the_grid_are_refused(size):
    rule = rf"their size divides its sides \(size=\({size[0]},.*sides=\(4, 6\)"
    with pytest.raises(ValueError, match=rule):
        to_regions(torch.zeros(24, 1), (4, 6), size)
    with pytest.raises(ValueError, match=rule):
        from_regions(torch.zeros(4, 6, 1), (4, 6), size)
