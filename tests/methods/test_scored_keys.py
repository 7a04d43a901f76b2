"""Pages that score keys and values themselves: where a layer stores latents, and where heads share a budget."""

import pytest

from regard import catalog
from regard.testing.cache import small
from regard.testing.cache.checks import check_oracle, check_rows

PAGES = ("compactor", "cur", "keydiff", "lagkv", "leverage", "non_causal_attention", "random_eviction")


@pytest.mark.parametrize("name", PAGES)
def test_latents_that_are_expanded_for_many_heads_are_scored_once(name):
    method = catalog.method(name, **small(catalog.get(name)))
    assert check_oracle(method, "deepseek3") > 1e-3


@pytest.mark.parametrize("name", PAGES)
def test_heads_that_share_a_budget_hold_what_they_ask_for(name):
    method = catalog.method(f"{name}+adakv", **small(catalog.get(name)))
    assert check_oracle(method, "llama") > 1e-3
    # equal scores of lagkv's parts are shared out by slot, and compactor standardises what is stored at one length
    if name not in ("lagkv", "compactor"):
        check_rows(method, "llama")
