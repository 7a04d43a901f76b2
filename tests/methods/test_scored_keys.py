"""Pages that score keys and values themselves: where a layer stores latents, and where heads share a budget."""

import pytest
import torch

from regard import catalog
from regard.ops import View
from regard.testing.cache import small
from regard.testing.cache.checks import check_oracle, check_rows
from regard.testing.cache.script import play, script
from regard.testing.zoo import build

PAGES = ("compactor", "cur", "keydiff", "lagkv", "leverage", "non_causal_attention", "random_eviction")


@pytest.mark.parametrize("name", PAGES)
def test_latents_that_are_expanded_for_many_heads_are_scored_once(name):
    method = catalog.method(name, **small(catalog.get(name)))
    assert check_oracle(method, "deepseek3") > 1e-3


@pytest.mark.parametrize("name", PAGES)
def test_heads_that_share_a_budget_hold_what_they_ask_for(name):
    method = catalog.method(f"{name}+adakv", **small(catalog.get(name)))
    assert check_oracle(method, "llama") > 1e-3
    play(build("llama")[0], method, script(pads=(0, 0)))  # rows of one length, whose tables are shared
    # equal scores of lagkv's parts are shared out by slot, and compactor standardises what is stored at one length
    if name not in ("lagkv", "compactor"):
        check_rows(method, "llama")


def test_curdkv_gives_every_head_scores_that_sum_to_one():
    """However long its keys and values are: heads that share a budget then compare what is alike."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 2, 3, 40, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    view = View(
        q=k[0], k=k[0], v=v[0], index=torch.arange(40)[None, None], real=None, scale=1.0, seen=40,
        budget=torch.tensor([8, 8]), groups=3,
    )  # fmt: skip
    method = catalog.method("cur")
    torch.testing.assert_close(method.page.score(view, method.config).sum(-1), torch.ones(2, 3))
