"""CriticalKV among others: what shares the budget lies over it, and sees which tokens its first half takes."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.core import Unsupported
from regard.methods.caches import criticalkv
from regard.ops import View
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


def test_what_goes_by_score_stays_however_long_other_values_are():
    attention = torch.tensor([0.5, 0.4, 0.04, 0.03, 0.02, 0.01])
    v = torch.tensor([1.0, 1.0, 1.0, 1e5, 2e5, 9e5]).expand(2, 1, 6)[..., None]
    view = View(
        v[:, :, :1], v, v, torch.arange(6)[None, None], None, 1.0, 6, torch.tensor([4, 4]), 1,
        output=torch.ones(1, 1, 1),
    )  # fmt: skip
    none = torch.zeros(1, 1, 6, dtype=torch.bool)
    below = replace(catalog.get("snapkv"), score=lambda *_: attention.expand(2, 1, 6), always=lambda *_: none)
    scored = criticalkv.score(view, None, below, criticalkv.Config())
    # by attention the first two, in their order; by what their values add the last and the one before it
    assert scored.argsort(-1, descending=True)[..., :4].tolist() == [[[0, 1, 5, 4]]] * 2
