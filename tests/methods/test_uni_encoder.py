"""Uni-Encoder: the three shapes and the positions by a loop over pairs, padding, and equal scores in any order."""

import pytest
import torch

import regard
from regard.core.roles import Roles
from regard.methods.positions import uni_encoder as page

CANDIDATE = [-1, -1, -1, 0, 0, 1, 1, 1, 2]
AT = [0, 1, 2, 3, 4, 3, 4, 5, 3]


def sees(shape, q, k):
    if shape == "square" or q == k:
        return True
    return shape == "arrow" and (q == -1 or k == -1)


@pytest.mark.parametrize("shape", ["arrow", "diag", "square"])
def test_shapes_are_the_authors(shape):
    wanted = [[sees(shape, q, k) for k in CANDIDATE] for q in CANDIDATE]
    actual = page.build(page.Config(shape)).dense(9, roles=Roles(candidate=CANDIDATE))
    assert actual.tolist() == [[wanted]]


def test_candidates_start_where_the_context_ends_wherever_padding_stands():
    index = torch.tensor([[-1, *range(9), -1], [*range(3), -1, *range(3, 6), -1, *range(6, 9)]])
    roles = Roles(candidate=CANDIDATE).gather(index)
    roles = roles.with_(padding=(index < 0).long())
    at = page.positions(roles, page.Config())
    assert all(row[there].tolist() == AT for row, there in zip(at, index >= 0))


def test_a_layer_gives_candidates_the_same_in_any_order():
    torch.manual_seed(0)
    layer = regard.nn.Attention(16, 2, pattern="self", positions="uni_encoder").double()
    context, (a, b) = torch.randn(1, 5, 16).double(), torch.randn(2, 1, 3, 16).double()
    roles = Roles(candidate=[-1] * 5 + [0] * 3 + [1] * 3)
    one, other = (layer(torch.cat([context, *order], 1), roles=roles)[0] for order in ((a, b), (b, a)))
    torch.testing.assert_close(other, one[:, [0, 1, 2, 3, 4, 8, 9, 10, 5, 6, 7]])


def test_causal_attention_would_hide_what_it_is_for():
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(regard.core.Unsupported, match="lets tokens see later ones"):
        regard.attend(q, q, q, "softmax", mask="uni_encoder", roles=Roles(candidate=CANDIDATE))
    with pytest.raises(ValueError, match="shape is one of arrow, diag, square"):
        page.Config("round")
