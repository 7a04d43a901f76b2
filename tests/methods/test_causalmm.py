"""Draws of counterfactual maps belong to places, and a map made counterfactual stays one of attention."""

import pytest
import torch

from regard.methods.steering import causalmm as page
from regard.ops.steered import Steered


def at(rows, **how):
    return Steered(2, 4, "prefill", "cf_language", rows=rows, **how)


def test_draws_are_the_same_with_padding_and_with_a_cache():
    whole = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    rows = torch.arange(6)[None]
    drawn = page.draws(at(rows), 3, whole)
    padded = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    padded[:, :, 2:, 2:] = whole
    beside = page.draws(at(torch.cat([torch.tensor([[-1, -1]]), rows], 1)), 3, padded)
    assert torch.equal(beside[:, :, 2:, 2:][..., whole[0, 0]], drawn[..., whole[0, 0]])
    last = page.draws(at(rows[:, 5:]), 3, whole[:, :, 5:])
    assert torch.equal(last, drawn[:, :, 5:])
    others = [page.draws(at(rows, seed=1), 3, whole), drawn.roll(1, 1), drawn.roll(1, 2)]
    assert all((drawn[..., 5, :] != other[..., 5, :]).all() for other in others)


def test_draws_are_uniform():
    seen = torch.ones(1, 1, 100, 100, dtype=torch.bool)
    drawn = page.draws(at(torch.arange(100)[None]), 4, seen).flatten()
    assert abs(drawn.mean() - 1 / 2) < 0.006 and abs(drawn.var() - 1 / 12) < 0.003
    assert torch.histc(drawn, 10, 0, 1).sub(4000).abs().max() < 300
    assert len(drawn.unique()) > 39_990


@pytest.mark.parametrize("kind", page.KINDS)
def test_a_row_keeps_its_sum_and_sees_nothing_new(kind):
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    w = torch.randn(2, 3, 5, 5).masked_fill(~seen, -torch.inf).softmax(-1).bfloat16()
    made = page.counterfactual(w, seen, kind, torch.rand(2, 3, 5, 5))
    assert made.dtype == w.dtype and torch.allclose(made.float().sum(-1), w.float().sum(-1), atol=0.01)
    assert not made.masked_select(~seen.expand_as(made)).any()


def test_bad_settings_are_refused_and_each_pass_acts_in_one_tower():
    with pytest.raises(ValueError, match="a map becomes"):
        page.Config(vision="mirrored")
    with pytest.raises(ValueError, match="a counterfactual pass"):
        page.Config(vision="", language="")
    assert page.streams(page.Config(strength=0.0)) == ()
    assert [s.name for s in page.streams(page.Config(language=""))] == ["cf_vision"]
    made = [
        page.acts(Steered(0, 1, "prefill", stream, tower=tower), page.Config())
        for stream in ("main", "cf_vision", "cf_language")
        for tower in ("vision", "text")
    ]
    assert made == [False, False, True, False, False, True]
