"""Under budgets by head a row of a batch holds what it holds alone, whatever groups of heads the other rows make.

Heads of a batch are parted by the longest of their rows, so one row's heads lie in other groups, and in another order,
than alone: a score that looks at several heads, and a tie between heads, must not see which.
"""

import pytest

from regard import catalog
from regard.testing.cache import small
from regard.testing.cache.checks import check_rows

STEPS = (30, 1, 1, 1, 5, 1, 1, 3, 1)
# pages whose scores look at all heads of a layer, or have many ties, one on another and under other allocators
SEVERAL = (
    "tova+criticalkv+adakv", "tova+chunkkv:chunk=3+adakv", "knorm+chunkkv:chunk=3+adakv",
    "knorm+chunkkv:chunk=3,reuse=2+adakv:floor=0.0", "compactor:first=1,last=2,chunk=5+chunkkv:chunk=3+adakv",
    "rkv+chunked:length=5+adakv", "lagkv:sinks=1,lag=3+chunked:length=5+adakv", "tova+every:n=3+adakv",
    "compactor:first=1,last=2,chunk=5+headkv:importance=((1.,2.,3.,9.),(2.,0.,5.,1.),(4.,4.,1.,2.))",
    "tova+headkv:importance=((1.,2.,3.,9.),(2.,0.,5.,1.),(4.,4.,1.,2.))", "lagkv:sinks=1,lag=3+pyramidkv:beta=3.0",
)  # fmt: skip


def with_scores():
    """Every cache page of its own that has scores."""
    for name, page in catalog.every():
        if page.kind == "cache" and page.score is not None and page.allocate is None and page.wrap is None:
            yield name


@pytest.mark.parametrize("name", with_scores())
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_share_a_budget_by_head(name, seed):
    method = catalog.method(f"{name}+adakv", **{**small(catalog.get(name)), "budget": 10})
    check_rows(method, "llama", seed, STEPS)


@pytest.mark.parametrize("spec", SEVERAL)
@pytest.mark.parametrize("seed", range(2))
def test_rows_under_several_methods(spec, seed):
    check_rows(catalog.from_spec(spec).with_settings(budget=10), "llama", seed, STEPS)
