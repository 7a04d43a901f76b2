"""ACDiT's mask, quarter by quarter, as the authors build it in loops; and positions beside padding."""

import pytest
import torch

from regard.core.roles import Roles
from regard.methods.positions import acdit_scam as page


@pytest.mark.parametrize(("block", "blocks"), [(1, 5), (3, 4), (4, 1), (2, 2)])
def test_the_four_quarters(block, blocks):
    n = block * blocks
    wanted = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for i in range(blocks):
        own = slice(i * block, (i + 1) * block)
        wanted[own, : (i + 1) * block] = True  # clean to clean
        noisy = slice(n + i * block, n + (i + 1) * block)
        wanted[noisy, : i * block] = True  # noisy to clean
        wanted[noisy, noisy] = True
    assert torch.equal(page.build(page.Config(block, blocks)).dense(2 * n)[0, 0], wanted)


def test_both_halves_stand_at_the_same_positions():
    cfg = page.Config(block=2, blocks=3)
    assert page.positions(Roles(padding=[0] * 12), cfg).tolist() == [*range(6), *range(6)]
    padded = page.positions(Roles(padding=[1] + [0] * 6 + [1] + [0] * 6), cfg).tolist()
    assert padded[1:7] == padded[8:] == [*range(6)]
