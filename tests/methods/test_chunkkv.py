"""ChunkKV among others: chunks with equal means are told apart by their place, whatever the order of slots."""

import pytest

from regard import catalog
from regard.core import Unsupported
from regard.testing.cache.checks import check_rows


def test_rows_under_an_allocator_hold_what_they_hold_alone():
    method = catalog.method("snapkv+chunkkv+pyramidkv", budget=8, window=3, chunk=3)
    check_rows(method, "llama")


def test_a_page_without_scores_has_no_means():
    with pytest.raises(Unsupported, match="chunkkv takes the mean of scores, and StreamingLLM has none"):
        catalog.method("streaming_llm+chunkkv")
