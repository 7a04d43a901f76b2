"""Tensor attention's features: one for each monomial, the Taylor coefficient in one factor only."""

import math
from inspect import unwrap

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("tensor_attention")
MONOMIALS, FEATURES = (unwrap(PAGE.fast).__globals__[name] for name in ("monomials", "features"))


@pytest.mark.parametrize(("width", "degree"), [(1, 4), (3, 4), (8, 2)])
def test_the_product_of_three_features_is_the_polynomial(width, degree):
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(20, width, generator=g).double() for _ in range(3))
    plan, weights = MONOMIALS(width, degree)
    assert len(weights) == math.comb(width + degree, degree)
    weights = torch.tensor(weights, dtype=torch.float64)
    polynomial = (FEATURES(a, plan) * weights * FEATURES(b, plan) * FEATURES(c, plan)).sum(-1)
    s = (a * b * c).sum(-1) / width
    assert_close(polynomial, sum(s**r / math.factorial(r) for r in range(degree + 1)), rtol=1e-10, atol=1e-10)


def test_it_sees_what_no_weighted_mean_of_single_keys_can():
    """The value of a pair counts only where both of its tokens fit the query."""
    q = torch.tensor([[[[6.0, 0.0], [0.0, 6.0]]]]).double()
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]]).double()
    v = torch.eye(3).double()[None, None]
    params = {"key": torch.eye(5, dtype=torch.float64)[:2], "value": torch.eye(5, dtype=torch.float64)[2:]}
    x = torch.cat([k[:, 0], torch.eye(3).double()[None]], dim=-1)
    call = Call("cross", params=params, x=(q[:, 0], x))
    out = PAGE.fast(q, k, v, PAGE.config(), call)[0]
    assert_close(out, PAGE.reference(q, k, v, PAGE.config(), call)[0])
    assert out[0, 0, 0, 0] > 5 * out[0, 0, 0, 1] and out[0, 0, 1, 1] > 5 * out[0, 0, 1, 0]


def test_what_would_not_fit_or_could_vanish_is_refused():
    wide = torch.zeros(1, 1, 2, 64)
    call = Call(params={"key": torch.zeros(64, 1), "value": torch.zeros(64, 1)}, x=torch.zeros(1, 2, 1))
    for path in (PAGE.reference, PAGE.fast):
        with pytest.raises(ValueError, match="features"):
            path(wide, wide, wide, PAGE.config(), call)
    with pytest.raises(ValueError, match="even degree"):
        PAGE.configure(degree=3)
