"""Symbolic tasks by hand, what is held out, which tasks are alike, and where answers stand in a text."""

from types import SimpleNamespace

import torch

from regard.claims.findings import cross_task_icl as claim
from regard.claims.lab import generator

HELD, KNOWN = ({*map(tuple, tasks.tolist())} for tasks in (claim.held_out(), claim.known()))


def test_answers_by_hand():
    tasks = torch.tensor([[0, 0], [1, 3], [3, 1], [5, 5]])  # orders 012, 021, 120, 210
    x = torch.tensor([[0, 1, 2]]).expand(4, 1, 3)
    assert claim.answers(tasks, x)[:, 0].tolist() == [[0, 1, 2], [3, 5, 4], [2, 3, 1], [1, 0, 5]]


def test_a_section_is_its_definition_and_its_rows():
    ids, scored = claim.section(torch.tensor([[1, 3]]), torch.tensor([[[0, 1, 2], [5, 4, 0]]]))
    assert ids.tolist() == [[9, 17, 0, 1, 2, 6, 3, 5, 4, 7, 5, 4, 0, 6, 2, 3, 1, 7]]
    assert scored.nonzero()[:, 0].tolist() == [6, 7, 8, 14, 15, 16]


def test_held_out_tasks_are_new_and_their_parts_are_not():
    assert not HELD & KNOWN and len(HELD) == 12 and len(KNOWN) == 24
    assert {p for p, _ in KNOWN} == set(range(6)) and {s for _, s in KNOWN} == {s for _, s in HELD} == set(
        range(6)
    )


def test_no_text_for_training_holds_a_held_out_task():
    g = generator(0)
    alike, sizes = [], set()
    for _ in range(60):
        ids, scored = claim.texts(g)
        assert ids.shape == (claim.BATCH, len(scored)) and (ids >= 0).all() and (ids < claim.SIZE).all()
        heads = ids[:, [i for i in range(ids.shape[1]) if (ids[:, i] >= claim.FIRST).all()]]
        tasks = (heads - claim.FIRST - torch.tensor([0, 6, 0, 6])).view(-1, 2, 2)
        assert {*map(tuple, tasks.flatten(0, 1).tolist())} <= KNOWN
        alike.append(((tasks[:, 0] == tasks[:, 1]).sum(-1) == 1).float().mean().item())
        sizes.add(ids.shape[1])
    # half are made to be alike; of the others some are by chance
    assert 0.55 < sum(alike) / len(alike) < 0.75 and sizes == {20, 28, 36}


def test_related_tasks_share_one_part_and_unrelated_ones_none():
    g, tasks = generator(0), claim.held_out().repeat(20, 1)
    for alike in (True, False):
        other = claim.related(tasks, claim.known(), g, alike)
        assert ((other == tasks).sum(-1) == int(alike)).all() and {*map(tuple, other.tolist())} <= KNOWN


def test_an_example_is_near_and_not_the_question():
    asked = claim.Questions.of(claim.held_out(), generator(1))
    near = asked.nearest(generator(2))
    same = (near == asked.x).sum(-1)
    assert near.shape == (claim.ASKED, 1, 3) and (same < 3).all() and same.double().mean() > 0.9


def test_an_oracle_is_always_right_and_a_guess_hardly_ever():
    asked = claim.Questions.of(claim.held_out(), generator(3))
    before = claim.section(asked.tasks, asked.nearest(generator(4)))[0]

    def model(right):
        def forward(ids):
            tasks = ids[:, -9:-7] - claim.FIRST - torch.tensor([0, 6])  # the definition before the question
            y = claim.answers(tasks, ids[:, None, -7:-4])[:, 0]
            guesses = torch.zeros(*ids.shape, dtype=torch.long)
            guesses[:, -4:-1] = y if right else 0
            return SimpleNamespace(logits=torch.nn.functional.one_hot(guesses, claim.SIZE).float())

        return forward

    assert (
        claim.accuracy(model(True), asked, before) == 1 > 0.05 > claim.accuracy(model(False), asked, before)
    )
