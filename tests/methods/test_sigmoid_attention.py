"""Attention with pointwise weights: blocks of rows change nothing, weights are those of the definition."""

import math

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.api import attend
from regard.core.call import Call
from regard.ops import pointwise, softmax

PAGES = {name: catalog.get(name) for name in ("sigmoid_attention", "relu_attention")}
SIGMOID = PAGES["sigmoid_attention"]


def drawn(n: int, m: int, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [(2, heads, n, 3), (2, groups, m, 3), (2, groups, m, 5)]
    return [torch.randn(*size, generator=g, dtype=torch.float64) for size in sizes]


def masks(n: int, m: int) -> dict[str, torch.Tensor | None]:
    g = torch.Generator().manual_seed(1)
    return {
        "none": None,
        "keys": torch.rand(2, 1, 1, m, generator=g) < 0.7,
        "pairs": torch.rand(2, 4, n, m, generator=g) < 0.7,
    }


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("pattern", ["causal_self", "cross"])
@pytest.mark.parametrize("numbers", [1, 150, 400])
def test_blocks_of_rows_are_the_whole(monkeypatch, name, pattern, numbers):
    """One row at a time, blocks with a ragged last one, and two blocks; more keys than queries in each."""
    q, k, v = drawn(7, 11)
    for mask in masks(7, 11).values():
        wanted = attend(q, k, v, name, pattern, mask=mask, impl="reference").out
        monkeypatch.setattr(softmax, "BLOCK", numbers)
        assert_close(
            attend(q, k, v, name, pattern, mask=mask, impl="fast").out, wanted, rtol=1e-12, atol=1e-12
        )
        monkeypatch.undo()


def test_a_block_of_scores_is_all_that_is_held(monkeypatch):
    q, k, v = drawn(64, 64)
    monkeypatch.setattr(softmax, "BLOCK", 4096)
    seen = []

    def weigh(s, sees):
        seen.append(s.shape)
        return pointwise.only_seen(s, sees)

    pointwise.pointwise_attention(q, k, v, Call(), 1.0, weigh)
    assert [shape[2] for shape in seen] == [8] * 8
    assert [shape[3] for shape in seen] == list(range(8, 65, 8)), "a block ends at the key of its last query"


def test_the_bias_counts_the_keys_that_a_query_sees():
    """Scores of zero: every weight is 1 / (1 + n), whatever stands under the mask."""
    q, k, v = drawn(6, 6)
    out = attend(0 * q, k, torch.ones_like(v), "sigmoid_attention", mask=torch.arange(6) != 1).out
    n = torch.tensor([1.0, 1, 2, 3, 4, 5]).double()
    assert_close(out, (n / (1 + n))[:, None].expand_as(out))


def test_a_low_bias_with_normalisation_is_softmax_and_one_of_zero_is_not():
    q, k, v = drawn(9, 9)
    wanted = attend(q, k, v, "softmax").out
    low, zero = (attend(q, k, v, "sigmoid_attention", bias=bias, normalise=True).out for bias in (-60.0, 0.0))
    assert_close(low, wanted, rtol=1e-12, atol=1e-12)
    assert (zero - wanted).abs().max() > 0.1


def test_the_training_length_as_a_bias():
    """-7.62, the number in the authors' settings, is -log 2048."""
    assert math.log(2048) == pytest.approx(7.62, abs=0.005)
    q, k, v = drawn(1, 2048, groups=4)
    given, own = (attend(q, k, v, "sigmoid_attention", "cross", bias=b).out for b in (-math.log(2048), None))
    assert_close(given, own)


def test_relu_without_the_division_grows_with_the_length():
    q, k, v = drawn(5, 8)
    twice = [torch.cat([t, t], dim=2) for t in (k, v)]
    for alpha, growth in ((1.0, 1.0), (0.5, 2**0.5), (0.0, 2.0)):
        one, two = (attend(q, *kv, "relu_attention", "cross", alpha=alpha).out for kv in ((k, v), twice))
        assert_close(two, growth * one)
