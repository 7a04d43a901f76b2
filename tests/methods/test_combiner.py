"""What the battery leaves out: weights are a distribution over all that is visible, by the paper's factorisation."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("combiner")
PATHS = (PAGE.reference, PAGE.fast)


def weights(path, pattern, block, n=23, **settings):
    g = torch.Generator().manual_seed(n)
    q, k = (torch.randn(1, 1, n, 4, generator=g).double() for _ in range(2))
    unit = torch.eye(n).double()[None, None]
    return q[0, 0], k[0, 0], path(q, k, unit, PAGE.configure(block=block, **settings), Call(pattern))[0][0, 0]


@pytest.mark.parametrize("pattern", ["self", "causal_self"])
@pytest.mark.parametrize("block", [1, 4, 5, 30])
def test_every_visible_key_has_a_weight_and_they_sum_to_one(pattern, block):
    for path in PATHS:
        p = weights(path, pattern, block)[2]
        visible = torch.ones_like(p).tril() if pattern == "causal_self" else torch.ones_like(p)
        assert_close(p.sum(-1), torch.ones(23).double())
        assert (p[visible == 1] > 0).all() and not p[visible == 0].any()


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_within_a_region_all_queries_share_one_distribution(pool):
    """Rows of the weights divided by the region's: the softmax of the pooled query over the region's keys."""
    for path in PATHS:
        q, k, p = weights(path, "self", 5, pool=pool)
        region = slice(5, 10)
        asked = q[region].amax(0) if pool == "max" else q[region].mean(0)
        wanted = (k[region] @ asked / 2).softmax(0)
        for i in (0, 4, 10, 22):
            assert_close(p[i, region] / p[i, region].sum(), wanted)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="pool is one of"):
        PAGE.configure(pool="sum")
    with pytest.raises(ValueError, match="block >= 1"):
        PAGE.configure(block=0)
