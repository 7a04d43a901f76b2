"""Debiasing keeps no padding even among tokens without attention; a trend that falls below zero is refused."""

import pytest
import torch

from regard.methods.tokens import attention_debias_pruning as page

ONE = torch.zeros(4, dtype=torch.long)


def test_padding_is_not_kept_where_nothing_is_attended_to():
    padding = torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = page.measure(torch.zeros(2, 4), ONE, padding, page.Config(keep=3))
    assert found["kept"].tolist() == [2, 3]


def test_an_exact_trend_leaves_no_order_of_places():
    u = torch.linspace(0, 1, 4, dtype=torch.float64)
    cfg = page.Config(trend=page.fit((2.5 * u).exp()[None], None, page.Config()))
    found = page.measure((2.5 * u).exp()[None], ONE, None, cfg)["debiased"]
    assert cfg.trend == pytest.approx((2.5,)) and torch.allclose(found, torch.ones(4, dtype=torch.float64))


def test_a_trend_below_zero_is_refused():
    cfg = page.Config(trend=(-3.0, 0.0, 0.0), family="cubic")
    with pytest.raises(ValueError, match="above 0 everywhere"):
        page.measure(torch.ones(1, 4), ONE, None, cfg)
