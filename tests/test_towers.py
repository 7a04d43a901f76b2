"""What a tower of pictures attended to, from its own queries and keys."""

from types import SimpleNamespace

import pytest
import torch

from regard.attaching.towers import Layout, Tower
from regard.ops import softmax


@pytest.mark.parametrize("block", [None, 1])
def test_what_a_patch_receives_is_the_mean_over_all_queries_of_its_image(block, monkeypatch):
    """Two pictures of seven tokens, of which visual tokens are made of three each; two heads."""
    if block:
        monkeypatch.setattr(softmax, "BLOCK", block)
    q, k = torch.randn(2, 2, 7, 4, dtype=torch.double), torch.randn(2, 2, 7, 4, dtype=torch.double)
    tower, members = Tower(), torch.tensor([[0, 1, 2], [4, 5, 6]])
    tower.note(SimpleNamespace(q=q, k=k, options={"scaling": 0.7}, site=SimpleNamespace(layer=0)))
    for row in (0, 1):
        got = tower.received(0, Layout(row=row, members=members, grid=None))
        weights = (0.7 * q[row] @ k[row].mT).softmax(-1)
        torch.testing.assert_close(got, weights.mean(1)[:, members].mean(-1), check_dtype=False)
