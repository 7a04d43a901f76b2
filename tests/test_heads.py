"""Heads on other heads' keys: what no page is asked, function by function; and laws that pages are exempt from."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.attaching.calibrate import by_kv_head
from regard.kinds.mechanism import Mechanism
from regard.ops import View, gather_rows
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


def view(groups):
    """Four query heads on so many KV heads, three new tokens after two."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 4, generator=g) for h, n in ((4, 3), (groups, 5), (groups, 5)))
    return View(q, k, v, torch.arange(5)[None, None], None, 0.5, 5, torch.tensor([5, 5]), groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_what_query_heads_give_is_summed_over_those_that_share_a_kv_head(groups):
    given = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 5)
    wanted = {1: [6.0], 2: [1.0, 5.0], 4: [0.0, 1.0, 2.0, 3.0]}[groups]
    assert view(groups).by_cache_head(given)[1, :, 2].tolist() == wanted


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scores_and_weights_of_chosen_heads_are_those_of_all(groups):
    """Query head h meets KV head h // (4 / G), alone or among all."""
    at, chosen = view(groups), [1, 2]
    own = at.k.repeat_interleave(4 // groups, 1)
    torch.testing.assert_close(at.scores(), 0.5 * at.q @ own.mT)
    for function in (at.scores, at.weights):
        torch.testing.assert_close(function(slice(1, 3), chosen), function()[:, chosen, 1:3])


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_are_gathered_from_the_kv_head_that_a_query_head_reads(groups, dense):
    """Slots of four query heads, of keys that lie beside each other or in a longer buffer."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, groups, 9, 3, generator=g)
    x = x if dense else torch.cat([x, x], dim=2)[:, :, :9]
    slots = torch.randint(9, (2, 4, 5), generator=g)
    wanted = x.repeat_interleave(4 // groups, 1).gather(2, slots[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(gather_rows(x, slots), wanted)
