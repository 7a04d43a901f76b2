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


def filter_of(inputs) -> torch.Tensor:
    """h [H, D, N], read off the operator: what a 1 at the first place gives with gates of 1."""
    spike = torch.zeros_like(inputs.v)
    spike[:, :, 0] = 1
    ones = replace(inputs, q=torch.ones_like(inputs.q), k=torch.ones_like(inputs.k), v=spike)
    return CASE.run(PAGE.reference, ones)[0][0].mT


@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_sum_over_distances(path):
    inputs = CASE.inputs(7)
    h, out = filter_of(inputs), CASE.run(path, inputs)[0]
    both = replace(CASE, pattern="self").run(path, inputs)[0]
    u = inputs.k * inputs.v
    for t in range(7):
        past = sum(h[..., t - s] * u[:, :, s] for s in range(t + 1))
        ahead = sum(h[..., s - t] * u[:, :, s] for s in range(t + 1, 7))
        same("the sum over distances", out[:, :, t], inputs.q[:, :, t] * past)
        same("the sum over distances to both sides", both[:, :, t], inputs.q[:, :, t] * (past + ahead))


@pytest.mark.parametrize("path", PATHS)
def test_a_hidden_token_in_the_middle_is_left_out(path):
    """Distances count the tokens that are there, also past a hole, and by row where rows hide different ones."""
    inputs, kept = CASE.inputs(7), [0, 1, 2, 4, 5, 6]
    shown = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    shown[0, ..., 3] = False
    both = replace(CASE, pattern="self")
    for case in (CASE, both):
        out, whole = case.run(path, inputs, shown)[0], case.run(path, inputs)[0]
        left = replace(inputs, **{name: getattr(inputs, name)[:, :, kept] for name in "qkv"})
        same("hidden = left out", out[0, :, kept], case.run(path, left)[0][0])
        same("nothing hidden in row 1", out[1], whole[1])


@pytest.mark.parametrize("path", PATHS)
def test_a_longer_text_has_the_same_filter(path):
    inputs = CASE.inputs(40)  # five times the unit of distance
    short = CASE.run(path, inputs.span(slice(0, 9)))[0]
    same("the first 9 of 40", CASE.run(path, inputs)[0][:, :, :9], short)


@pytest.mark.parametrize("path", PATHS)
def test_what_it_refuses(path):
    inputs = CASE.inputs(5)
    for pattern in ("cross", "causal_cross"):
        with pytest.raises(Unsupported, match="distance"):
            replace(CASE, pattern=pattern).run(path, inputs)
    with pytest.raises(Unsupported, match="widths 4 and 3 differ"):
        path(inputs.q, inputs.k, inputs.v[..., :3], CFG, Call(params=inputs.params))
