"""Slopes of laws are taken along some numbers of a tensor and along a line through all: no number is left out."""

from types import SimpleNamespace

import pytest
import torch

from regard.testing.case import Broken
from regard.testing.laws.equality import MOST, check_gradients, wrong_gradients


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

    return SimpleNamespace(inputs=inputs, run=run, page=SimpleNamespace(reference=None), tol=1e-9)


@pytest.mark.parametrize("number", [0, 17, 100, 299])
def test_one_wrong_number_of_many_is_named(number):
    for seed in range(4):
        at, found, wanted = wrong_gradients(case_of([number], 300), 3, seed)["w"]
        assert at == [number] and found == 0 and abs(wanted) > 1e-4
    with pytest.raises(Broken, match=rf"the gradient of w at \[{number}\]"):
        check_gradients(case_of([number], 300))


@pytest.mark.parametrize("size", [1, MOST, MOST + 1, 300])
def test_right_ones_pass(size):
    assert wrong_gradients(case_of([], size), 3, 0) == {}
    check_gradients(case_of([], size))
