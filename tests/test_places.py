"""Answers that layers share because their tokens stand alike, and the step that lets go of one slot."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.attaching.places import Places, alike
from regard.attaching.slots import Group
from regard.ops import Kept, keep_best
from regard.ops.kept import best_by_age
from regard.ops.topk import slots_of
from regard.ops.view import View
from regard.testing.cache.handling import check_by_place

H2O = catalog.method("h2o", budget=8)


def test_an_answer_is_found_once_for_facts_that_agree():
    places, calls = Places(), []
    ask = lambda *facts: places.once("keep", facts, lambda: calls.append(facts) or len(calls))  # noqa: E731
    assert [ask(torch.arange(3), 1), ask(torch.arange(3), 1), ask(torch.arange(4), 1), ask(torch.arange(3), 1)] == [
        1, 1, 2, 3,
    ]  # fmt: skip
    places.clear()
    assert ask(torch.arange(3), 1) == 4


@pytest.mark.parametrize(
    "other",
    [(torch.arange(3).int(), None), (torch.tensor([0, 1, 3]), None), (torch.arange(3), 1), (torch.arange(3),),
     (torch.arange(3)[None], None), (None, None)],
)  # fmt: skip
def test_facts_that_differ_are_not_alike(other):
    assert alike((torch.arange(3), None), (torch.arange(3), None))
    assert not alike((torch.arange(3), None), other)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_a_page_that_weighs_keys_is_caught_when_it_says_that_it_goes_by_place(family):
    lying = replace(H2O, page=replace(H2O.page, by_place=True))
    with pytest.raises(AssertionError, match="by place"):
        check_by_place(lying, family)


def view(index: torch.Tensor, budget: int, heads: int = 2) -> View:
    n = index.shape[-1]
    k = torch.zeros(2, heads, n, 4)
    return View(
        q=torch.zeros(2, heads, 1, 4), k=k, v=k, index=index, real=None, scale=1.0, seen=40,
        budget=torch.full((2,), budget), groups=heads,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_letting_one_slot_go_keeps_what_choosing_the_best_keeps(seed):
    """Ties, tables that are not in order, and scores that are equal everywhere."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(12, generator=g) for _ in range(4)]).view(2, 2, 12)
    seen = view(index, budget=11)
    score = torch.randint(0, 1 + seed % 4, (2, 2, 12), generator=g).float()
    always = seen.index > 8
    forced = torch.where(always, torch.finfo(torch.float32).max, score)
    expected = slots_of(best_by_age(seen, forced, seen.budget[:, None]))
    kept = keep_best(seen, score, always)
    assert torch.equal(kept.slots, expected)
    assert torch.equal(Kept(expected).holes, kept.holes)


def test_empty_slots_and_scores_of_nothing_take_the_long_way():
    index = torch.arange(12).repeat(2, 2, 1)
    index[0, 0, 3] = -1
    score = torch.ones(2, 2, 12)
    assert (keep_best(view(index, budget=11), score).slots[0, 0] >= 0).all()
    score[1, 1, 2:5] = -torch.inf
    assert keep_best(view(torch.arange(12).repeat(2, 2, 1), budget=11), score).slots[1, 1].tolist()[-2:] == [
        -1,
        -1,
    ]


@pytest.mark.parametrize("holes", [[[3]], [[3, 7], [0, 7]], [[2, 2], [2, 2]]])
@pytest.mark.parametrize("room", [8, 12])
def test_the_newest_token_takes_the_place_of_the_one_that_goes(holes, room):
    keys, holes = torch.randn(2, 2, room, 4), torch.tensor(holes)
    group = Group((0, 1), keys.clone(), -keys.clone(), 8)
    group.note("x").copy_(keys[:, :, :8, 0])
    group.keep(Kept.all_but(holes, 8))
    for b in range(2):
        for h in range(2):
            table = group.table().expand(2, 2, -1)[b, h]
            assert sorted(table.tolist()) == [i for i in range(8) if i != int(holes.expand(2, 2)[b, h])]
            assert torch.equal(group.k()[b, h], keys[b, h, table])
            assert torch.equal(group.v()[b, h], -keys[b, h, table])
            assert torch.equal(group.note("x")[b, h], keys[b, h, table, 0])
