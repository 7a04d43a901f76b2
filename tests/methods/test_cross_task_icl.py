"""Symbolic tasks by hand, what is held out, which tasks are alike, and where answers stand in a text."""

from types import SimpleNamespace

import pytest
import torch

from regard.claims.findings import cross_task_icl as claim
from regard.claims.lab import generator

HELD, KNOWN = ({*map(tuple, pairs.tolist())} for pairs in (claim.held_out(), claim.known()))


def test_answers_by_hand():
    # orders 012, 021, 120, 210; shifts 0, 3, 1, 2; alphabets 0, 1, 2, 0, which begin at tokens 4, 8, 12
    tasks = torch.tensor([[0, 0, 0, 0], [1, 3, 1, 1], [3, 1, 5, 2], [5, 2, 9, 0]])
    x = torch.tensor([[0, 1, 3]]).expand(4, 1, 3)
    assert claim.answers(tasks, x)[:, 0].tolist() == [[4, 5, 7], [11, 10, 8], [14, 12, 13], [5, 7, 6]]


def test_a_section_is_its_definition_and_its_rows():
    ids, scored = claim.section(torch.tensor([[1, 3, 4, 1]]), torch.tensor([[[0, 1, 3], [2, 2, 0]]]))
    assert ids.tolist() == [[19, 27, 32, 0, 1, 3, 16, 11, 10, 8, 17, 2, 2, 0, 16, 9, 11, 9, 17]]
    assert scored.nonzero()[:, 0].tolist() == [7, 8, 9, 15, 16, 17]


def test_held_out_pairs_are_new_and_their_parts_are_not():
    assert not HELD & KNOWN and len(HELD) == 6 and len(KNOWN) == 18
    assert {p for p, _ in KNOWN} == set(range(6)) and {s for _, s in KNOWN} == set(range(4))


def test_a_known_word_says_its_alphabet_and_a_new_word_does_not():
    told, new = (claim.tasks(900, claim.held_out(), generator(0), share) for share in (0.0, 1.0))
    assert (told[:, 2] == told[:, 3]).all() and {*map(tuple, told[:, :2].tolist())} == HELD
    assert {*new[:, 2].tolist()} == set(range(3, 11))
    of_a_word = torch.bincount(new[new[:, 2] == 5, 3], minlength=3) / (new[:, 2] == 5).sum()
    assert (of_a_word - 1 / 3).abs().max() < 0.15


@pytest.mark.parametrize("shared", [True, False])
def test_the_two_tasks_of_a_text(shared):
    g = generator(0)
    first = claim.tasks(8000, claim.known(), g)
    second = claim.second_tasks(first, shared, g)
    common = (first[:, 2] == second[:, 2]) & (first[:, 2] >= claim.ALPHABETS)
    assert common.double().mean() == pytest.approx(1 / 32 if shared else 0, abs=0.006)
    assert (first[common, 3] == second[common, 3]).all()
    told = second[second[:, 2] < claim.ALPHABETS]
    assert (told[:, 2] == told[:, 3]).all()


def test_no_text_for_training_holds_a_held_out_pair():
    g, sizes = generator(0), set()
    for _ in range(60):
        ids, scored = claim.texts(True, g)
        assert ids.shape == (claim.BATCH, len(scored)) and (ids >= 0).all() and (ids < claim.SIZE).all()
        orders = [i for i in range(ids.shape[1]) if (ids[:, i] >= claim.WORDS[0]).all() and i % 8 in (0, 3)]
        for i in orders:
            assert {*map(tuple, (ids[:, i : i + 2] - claim.WORDS[:2]).tolist())} <= KNOWN
        assert len(orders) == 2
        sizes.add(ids.shape[1])
    assert sizes == {22, 30, 38}


@pytest.mark.parametrize(("word", "order"), [(True, False), (False, False), (False, True)])
def test_a_source_shares_what_it_is_asked_to_and_nothing_else(word, order):
    g = generator(0)
    target = claim.tasks(600, claim.held_out(), g, 1.0)
    source = claim.sources(target, word, order, g)
    same = source == target
    assert {*map(tuple, source[:, :2].tolist())} <= KNOWN and (source[:, 2] >= claim.ALPHABETS).all()
    assert (same[:, 0] == order).all() and not same[:, 1].any() and (same[:, 2] == word).all()
    assert same[:, 3].double().mean() == pytest.approx(1 if word else 1 / 3, abs=0.06)


def test_an_example_is_near_and_not_the_question():
    asked = claim.Questions.of(claim.held_out(), True, generator(1))
    same = (asked.examples == asked.x).sum(-1)
    assert asked.examples.shape == (claim.ASKED, 1, 3) and (same < 3).all() and same.double().mean() > 1.4


def reader(how):
    """A model that knows orders and shifts; an alphabet is what its word meant before, or 0."""

    def forward(ids, use_cache):
        n, y = ids.shape[1], torch.zeros(*ids.shape, dtype=torch.long)
        for row, out in zip(ids.tolist(), y, strict=True):
            starts = [i for i, token in enumerate(row) if 18 <= token < 24]
            order, shift, word = (row[starts[-1] + i] - int(claim.WORDS[i]) for i in range(3))
            told = {
                row[at + 2] - int(claim.WORDS[2]): (row[at + 7] - 4) // 4 for at in starts if at + 7 < n - 3
            }
            alphabet = word if word < 3 else told.get(word, 0) if how == "reads" else 0
            task = torch.tensor([[order, shift, word, alphabet]])
            out[-4:-1] = claim.answers(task, torch.tensor([[row[-7:-4]]]))[0, 0]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(y, claim.SIZE).float())

    return forward


@pytest.mark.parametrize("how", ["reads", "guesses"])
def test_a_model_that_reads_examples_gains_by_related_ones_alone(how, monkeypatch):
    monkeypatch.setattr(claim, "trained", lambda seed, shared: (reader(how), 0.0))
    row = claim.one(3, True)
    assert row["trained tasks zero-shot"] == row["held-out pairs, known words, zero-shot"] == 1  # all is told
    told = 1 if how == "reads" else pytest.approx(1 / 3, abs=0.04)
    assert (
        row["in-task"] == told and row["related"] == told and row["trained pairs, new words, in-task"] == told
    )
    for name in ("zero-shot", "unrelated", "same order", "trained pairs, new words, zero-shot"):
        assert row[name] == pytest.approx(1 / 3, abs=0.04)
    assert all(claim.bounds([row]).values()) == (how == "reads")


def test_the_bound_asks_for_every_part():
    row = dict.fromkeys(["zero-shot", "unrelated", "trained pairs, new words, zero-shot"], 0.3)
    row |= {"related": 0.36, "trained tasks zero-shot": 0.95, "trained pairs, new words, in-task": 0.9}
    assert all(claim.bounds([row]).values())
    spoiled = {"related": 0.34, "unrelated": 0.35, "trained tasks zero-shot": 0.8}
    spoiled["trained pairs, new words, in-task"] = 0.4
    for name, value in spoiled.items():
        assert not all(claim.bounds([row, row | {name: value}]).values())
