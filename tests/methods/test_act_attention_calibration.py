"""A planted sink: only it is damped, the first token takes its share, and heads that are not named stay as they are."""

import pytest
import torch

from regard.methods.steering import act_attention_calibration as page


def planted(n=8, sink=3):
    scores = torch.zeros(1, 2, n, n, dtype=torch.float64)
    scores[..., 0], scores[..., sink] = 3.0, 4.0
    seen = torch.ones(n, n).bool().tril()[None, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), seen


def test_the_planted_sink_gives_and_the_first_token_takes():
    w, seen = planted()
    changed, sinks = page.measure(w, seen, page.Config(alpha=0.3))
    assert sinks.nonzero()[:, 2].tolist() == [3, 3]
    assert torch.allclose(changed[..., 3], 0.4 * w[..., 3])
    assert (changed[..., 3:, 0] > w[..., 3:, 0]).all()
    assert torch.allclose(changed.sum(-1), w.sum(-1), atol=1e-12)


def test_rows_before_the_sink_stay():
    w, seen = planted()
    assert torch.equal(page.measure(w, seen, page.Config(alpha=0.3))[0][:, :, :3], w[:, :, :3])


def test_bad_settings_are_refused():
    for bad in ({"alpha": 1.5}, {"beta": -0.1}, {"heads": ((1,),)}):
        with pytest.raises(ValueError, match="must hold"):
            page.Config(**bad)
