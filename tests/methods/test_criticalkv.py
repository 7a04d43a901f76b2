"""CriticalKV among others: what shares the budget lies over it, and sees which tokens its first half takes."""

import pytest

from regard import catalog
from regard.core import Unsupported
from regard.testing.cache.checks import check_oracle, check_rows


@pytest.mark.parametrize("over", ["adakv", "pyramidkv"])
def test_an_allocator_over_it(over):
    method = catalog.method(f"snapkv+criticalkv+{over}", budget=8, window=3)
    assert check_oracle(method, "llama") > 1e-3
    check_rows(method, "llama")


def test_what_it_cannot_be_laid_over():
    with pytest.raises(Unsupported, match="criticalkv weighs scores, and TidalDecode has none"):
        catalog.method("tidaldecode+criticalkv")
    with pytest.raises(Unsupported, match=r"lies over it: snapkv\+criticalkv\+adakv"):
        catalog.method("snapkv+adakv+criticalkv")
