"""What the battery does not ask of a gated convolution: its own oracle, distances over holes, and any length."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.core import Unsupported
from regard.core.call import Call
from regard.testing.case import Case, same

PAGE = catalog.get("gated_convolution")
CFG = PAGE.configure(length=8)
CASE = Case(PAGE, CFG, "causal_self")
PATHS = tuple(CASE.paths.values())


def filter_of(given) -> torch.Tensor:
    """h [H, D, N], read off the operator: what a 1 at the first place gives with gates of 1."""
    spike = torch.zeros_like(given.v)
    spike[:, :, 0] = 1
    ones = replace(given, q=torch.ones_like(given.q), k=torch.ones_like(given.k), v=spike)
    return CASE.run(PAGE.reference, ones)[0][0].mT


@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_sum_over_distances(path):
    given = CASE.inputs(7)
    h, out = filter_of(given), CASE.run(path, given)[0]
    both = replace(CASE, pattern="self").run(path, given)[0]
    u = given.k * given.v
    for t in range(7):
        past = sum(h[..., t - s] * u[:, :, s] for s in range(t + 1))
        ahead = sum(h[..., s - t] * u[:, :, s] for s in range(t + 1, 7))
        same("the sum over distances", out[:, :, t], given.q[:, :, t] * past)
        same("the sum over distances to both sides", both[:, :, t], given.q[:, :, t] * (past + ahead))


@pytest.mark.parametrize("path", PATHS)
def test_a_hidden_token_keeps_its_place(path):
    given = CASE.inputs(7)
    shown = torch.arange(7).view(1, 1, 1, 7) != 3
    silent = given.v.clone()
    silent[:, :, 3] = 0
    hidden = CASE.run(path, given, shown)[0]
    same("hidden = silent", hidden, CASE.run(path, replace(given, v=silent))[0])


@pytest.mark.parametrize("path", PATHS)
def test_a_longer_text_has_the_same_filter(path):
    given = CASE.inputs(40)  # five times the unit of distance
    short = CASE.run(path, given.span(slice(0, 9)))[0]
    same("the first 9 of 40", CASE.run(path, given)[0][:, :, :9], short)


@pytest.mark.parametrize("path", PATHS)
def test_what_it_refuses(path):
    given = CASE.inputs(5)
    for pattern in ("cross", "causal_cross"):
        with pytest.raises(Unsupported, match="distance"):
            replace(CASE, pattern=pattern).run(path, given)
    with pytest.raises(Unsupported, match="widths 4 and 3 differ"):
        path(given.q, given.k, given.v[..., :3], CFG, Call(params=given.params))
