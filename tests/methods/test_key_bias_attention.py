"""The learned key: grouped heads, the first query, what it takes from others, and where no token is seen."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.api import attend

NAME = "key_bias_attention"
SETTINGS = [{}, {"value": True}, {"key": False, "value": True}]


def drawn(n: int, m: int, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [(2, heads, n, 3), (2, groups, m, 3), (2, groups, m, 5), (groups, 3), (groups, 5)]
    return [torch.randn(*size, generator=g, dtype=torch.float64) for size in sizes]


def params_of(settings: dict, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
    cfg = catalog.get(NAME).configure(**settings)
    return {name: t for name, t in (("key", key), ("value", value)) if getattr(cfg, name)}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pattern", ["causal_self", "cross"])
@pytest.mark.parametrize("masked", ["nothing", "keys", "keys by head", "pairs"])
def test_grouped_heads_are_heads_that_share_their_key(settings, pattern, masked):
    q, k, v, key, value = drawn(6, 6)
    g = torch.Generator().manual_seed(1)
    shape = {"keys": (2, 1, 1, 6), "keys by head": (2, 4, 1, 6), "pairs": (2, 4, 6, 6)}.get(masked)
    mask = None if shape is None else torch.rand(shape, generator=g) < 0.6
    each = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    learned = [t.repeat_interleave(2, dim=0) for t in (key, value)]
    wanted = attend(
        q, *each, NAME, pattern, mask=mask, params=params_of(settings, *learned), impl="reference", **settings
    )
    for impl in ("reference", "fast"):
        found = attend(
            q, k, v, NAME, pattern, mask=mask, params=params_of(settings, key, value), impl=impl, **settings
        )
        assert_close(found.out, wanted.out, rtol=1e-12, atol=1e-12)


def test_it_is_one_more_token_at_the_front():
    """Its own key and value, seen by all: softmax attention over the longer text, without its first query."""
    q, k, v, key, value = drawn(6, 6, heads=2)
    longer = [
        torch.cat([t[None, :, None].expand(2, -1, -1, -1), s], dim=2) for t, s in ((key, k), (value, v))
    ]
    first = torch.zeros_like(q[:, :, :1])
    wanted = attend(torch.cat([first, q], dim=2), *longer, "softmax").out[:, :, 1:]
    found = attend(q, k, v, NAME, value=True, params={"key": key, "value": value}).out
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_without_a_value_it_takes_weight_and_gives_nothing():
    q, k, v = drawn(6, 6)[:3]
    ones = torch.ones_like(v)
    strong = {"key": 50 * q[0, ::2, 3]}
    weights = attend(q, k, ones, NAME, params=strong).out
    assert_close(attend(q, k, ones, "softmax").out, torch.ones_like(weights))
    assert (weights[0, ::2, 3] < 1e-6).all(), "query 3 of the first row looks at the learned key alone"
    assert weights.max() > 0.99, "a query that does not fit it looks at tokens"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_a_query_that_sees_no_token_gives_zero(settings, impl):
    q, k, v, key, value = drawn(6, 6)
    mask = torch.arange(6) > 1
    out = attend(q, k, v, NAME, mask=mask, params=params_of(settings, key, value), impl=impl, **settings).out
    assert not out[:, :, :2].any() and out[:, :, 2:].abs().amin() > 0


def test_the_state_holds_tokens_only():
    q, k, v, key, _ = drawn(6, 6)
    keys, values = attend(q, k, v, NAME, params={"key": key}).final_state
    assert_close(keys, k)
    assert_close(values, v)
