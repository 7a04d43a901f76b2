"""Sink dimensions are found where they were planted, and none where no state is massive."""

import pytest
import torch

from regard.methods.steering import var as page


def test_planted_dimensions_are_found_at_any_width():
    for width in (64, 4096):
        states = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).sign()
        assert page.sink_dimensions(states) == ()
        states[0, 7], states[1, 40] = width, -width
        assert page.sink_dimensions(states) == (7, 40)


def test_the_first_token_alone_names_dimensions():
    states = torch.ones(1, 4, 64)
    states[0, 2, 9] = 100.0
    cfg = page.Config()
    assert not page.sinks_of(states, page.own_dimensions(states, torch.tensor([0]), cfg), cfg).any()
    found = page.sinks_of(states, page.own_dimensions(states, torch.tensor([2]), cfg), cfg)
    assert found.tolist() == [[False, False, True, False]]


def test_a_threshold_that_no_state_can_pass_is_refused():
    with pytest.raises(ValueError, match="sqrt"):
        page.Config(tau=20.0, width=256)
