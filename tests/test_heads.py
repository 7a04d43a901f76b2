"""Heads on other heads' keys: what no page is asked, function by function; and laws that pages are exempt from."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.attaching.calibrate import by_kv_head
from regard.kinds.mechanism import Mechanism
from regard.testing.case import Case
from regard.testing.laws import check_heads_alone
from regard.testing.mechanism import verdict
from regard.testing.zoo import build

MIXED = [n for n, p in catalog.every() if isinstance(p, Mechanism) and "heads_alone" in p.exempt]


@pytest.mark.parametrize("name", MIXED)
def test_heads_that_are_said_to_be_mixed_are(name):
    """An exemption from the law of heads alone is one that the page needs."""
    page = replace(catalog.get(name), exempt={})
    verdicts = [
        verdict(check_heads_alone, Case(page, page.configure(**options), pattern))
        for pattern in page.patterns
        for options in ({}, *page.test_settings)
    ]
    assert any(v.startswith("broken") for v in verdicts), verdicts


def test_the_best_query_head_speaks_for_the_kv_head_that_it_reads():
    """Four query heads on two KV heads: the first two on the first."""
    model, _ = build("llama")
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.4, 0.0, 0.8, 0.7], [0.5, 0.1, 0.6, 0.0]])
    assert by_kv_head(model, scores) == ((0, 0), (1, 1), (2, 1), (2, 0), (1, 0), (0, 1))
