"""AIM: sources of one token are averaged with it; importance flows along the graph."""

import pytest
import torch

from regard.methods.tokens import aim as page


def test_two_sources_of_one_token_are_averaged_with_it():
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.9, 0.1], [1.0, 0.0], [0.3, 1.0]])
    keep, features = page.merged(x, 3)
    assert keep.tolist() == [1, 3, 4]
    assert torch.allclose(features, torch.tensor([[0.0, 3.0], [2.9 / 3, 0.1 / 3], [0.3, 1.0]]))


def test_importance_ends_where_all_paths_end():
    chain = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    found = page.importance(chain, page.Config(iterations=2))
    assert torch.allclose(found, torch.tensor([1.0, 0.0, 0.0]))


def test_settings_out_of_order_are_refused():
    with pytest.raises(ValueError, match="start <= end"):
        page.Config(start=0.9, end=0.5)
