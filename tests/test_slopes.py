"""Slopes of laws are taken along some numbers of a tensor and along a line through all: no number is left out."""

from types import SimpleNamespace

import pytest
import torch

from regard.testing.case import Broken, Inputs
from regard.testing.laws.equality import (
    MOST,
    check_gradients,
    differences_in_rows,
    finite_differences,
    wrong_gradients,
)


class Given:
    """Inputs that are one tensor."""

    def __init__(self, t):
        self.t = t

    def map(self, change):
        return Given(change(self.t))

    def tensors(self):
        return {"w": self.t}


def case_of(cut, size):
    """A function of `size` numbers whose gradient along the numbers `cut` is not there."""

    def run(reference, given):
        w = given.t
        hidden = torch.zeros(size, dtype=torch.bool)
        hidden[cut] = True
        return (torch.where(hidden, w.detach(), w).sin(),)

    def inputs(*_, batch, seed=0):
        return Given(torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))

    return asked(inputs, run, apart=False)


def asked(inputs, run, apart):
    page = SimpleNamespace(reference=None)
    return SimpleNamespace(inputs=inputs, run=run, page=page, tol=1e-9, keeps_rows_apart=apart)


def tokens_of(cut, size):
    """The same of queries, whose slopes are asked as rows of one batch."""

    def run(reference, given):
        hidden = torch.zeros(size, dtype=torch.bool)
        hidden[cut] = True
        return (torch.where(hidden[:, None], given.q.detach(), given.q).sin(),)

    def inputs(*_, batch, seed=0):
        q = torch.randn(batch, 1, size, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return Inputs(q, *torch.zeros(2, batch, 1, 1, 1, dtype=torch.float64), params={})

    return asked(inputs, run, apart=True)


@pytest.mark.parametrize("number", [0, 17, 100, 299])
def test_one_wrong_number_of_many_tokens_is_named(number):
    for seed in range(2):
        at, found, wanted = wrong_gradients(tokens_of([number], 300), 3, seed)["q"]
        assert at == [0, 0, number, 0] and found == 0 and abs(wanted) > 1e-4
    assert wrong_gradients(tokens_of([], 300), 3, 0) == {}


def test_slopes_in_rows_are_those_along_one_line_after_another():
    case = tokens_of([], 40)
    given, weights = case.inputs(batch=1), torch.rand(1, 1, 40, 1, dtype=torch.float64)
    total = lambda inputs: (case.run(None, inputs)[0] * weights).sum()  # noqa: E731
    numbers = torch.tensor([3, 0, 39])
    rows = differences_in_rows(case, given, weights, "q", 1e-5, numbers)
    torch.testing.assert_close(rows, finite_differences(total, given, "q", 1e-5, numbers), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kinks", [(0,), (0, 1)])
def test_a_kink_that_lies_in_the_way_once_is_none(kinks):
    """A rectifier whose input is zero under these seeds: differences see half of its slope."""
    case = case_of([], 5)
    drawn = case.inputs
    case.inputs = lambda *_, batch, seed=0: Given(drawn(batch=1, seed=seed).t * (seed not in kinks))
    case.run = lambda reference, given: (given.t.relu(),)
    assert "w" in wrong_gradients(case, 3, 0) and ("w" in wrong_gradients(case, 3, 1)) == (1 in kinks)
    if len(kinks) == 1:
        check_gradients(case)
    else:
        with pytest.raises(Broken, match="the gradient of w at"):
            check_gradients(case)


@pytest.mark.parametrize("number", [0, 17, 100, 299])
def test_one_wrong_number_of_many_is_named(number):
    for seed in range(4):
        at, found, wanted = wrong_gradients(case_of([number], 300), 3, seed)["w"]
        assert at == [number] and found == 0 and abs(wanted) > 1e-4
    with pytest.raises(Broken, match=rf"the gradient of w at \[{number}\]"):
        check_gradients(case_of([number], 300))


@pytest.mark.parametrize("size", [1, 40])
def test_a_gradient_of_the_other_sign_is_found(size):
    """As of a function that is run on 2 x, of which the gradient is let through x times -1 alone."""
    case = case_of([], size)
    case.run = lambda reference, given: ((2 * given.t.detach() - given.t).sin(),)
    assert "w" in wrong_gradients(case, 3, 0) and "w" in wrong_gradients(case, 3, 1)


@pytest.mark.parametrize("size", [1, MOST, MOST + 1, 300])
def test_right_ones_pass(size):
    assert wrong_gradients(case_of([], size), 3, 0) == {}
    check_gradients(case_of([], size))
