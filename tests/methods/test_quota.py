"""QuoTA: what it refuses, and scores that images carry or that are set."""

import pytest
import torch

import regard
from regard.methods.tokens import quota
from regard.ops.images import ImageView


def views(*relevance: float | None) -> list[ImageView]:
    return [ImageView(torch.randn(16, 3), (4, 4), number=i, relevance=r) for i, r in enumerate(relevance)]


def test_several_images_need_their_relevance():
    with pytest.raises(ValueError, match="relevance of each image"):
        quota.before(views(None, None), quota.Config(keep=8))
    with pytest.raises(ValueError, match="relevance of each image"):
        quota.before(views(0.5, None), quota.Config(keep=8))
    with pytest.raises(ValueError, match="power >= 0"):
        regard.method("quota", power=-1.0)
    carried = quota.before(views(0.9, 0.3), quota.Config(keep=8))
    given = quota.before(views(None, None), quota.Config(keep=8, relevance=(0.9, 0.3)))
    assert [len(r.keep) for r in carried] == [len(r.keep) for r in given] == [7, 1]


def test_a_budget_that_minimums_exceed_is_refused():
    with pytest.raises(ValueError, match="minimum of each frame"):
        quota.quotas(torch.ones(3), torch.full((3,), 16), 5, quota.Config(minimum=2))


@pytest.mark.parametrize("quota_", range(1, 25))
def test_new_tokens_stand_on_tokens_of_their_own(quota_):
    keep, weights = quota.layout(quota_, (4, 6))
    assert len(keep) == quota_ and bool((keep.diff() > 0).all()) and int(keep.max(0).values) < 24
    assert torch.allclose(weights.sum(1), torch.ones(quota_, dtype=torch.float64))
