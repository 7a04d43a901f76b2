"""Effects of one head of a small residual network, by products of matrices and by hand."""

import pytest
import torch

from regard.claims.findings.right_mediator import EXACT, HEADS, LAYERS, effects, most_off, network, with_code


def test_an_indirect_effect_is_a_product_of_matrices():
    """Of a head of the second layer: what the first layer changes, through the head, through the third."""
    matrices, out = network()
    total, direct, indirect = effects(lambda x: x, inputs=3)
    g = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randn(3, 16, generator=g, dtype=torch.float64) for _ in range(2))
    one, layers = torch.eye(16, dtype=torch.float64), [torch.eye(16).double() + m.sum(0) for m in matrices]
    torch.testing.assert_close(total, (clean - corrupt) @ layers[0] @ layers[1] @ layers[2] @ out)
    head = matrices[1, 2]
    through = (clean - corrupt) @ layers[0] @ head @ layers[2] @ out
    past = (clean - corrupt) @ layers[0] @ (one + matrices[1].sum(0) - head) @ layers[2] @ out
    torch.testing.assert_close(indirect[1 * HEADS + 2], through)
    torch.testing.assert_close(direct[1 * HEADS + 2], past)
    assert len(direct) == LAYERS * HEADS


def test_effects_add_up_where_the_network_is_linear_and_only_there():
    assert most_off(lambda x: x) < EXACT and most_off(lambda x: 3 * x) < EXACT
    assert most_off(torch.tanh) > 0.01 and most_off(torch.relu) > 0.01


def test_a_code_is_replaced_where_it_stands():
    assert with_code([1, 7, 8, 2, 7, 9], [7, 9], [3, 4]) == [1, 7, 8, 2, 3, 4]
    with pytest.raises(StopIteration):
        with_code([1, 2], [3], [4])
