"""Induction's texts, what is ablated in the second copy alone, and heads that are made to look back."""

import pytest
import torch

from regard.claims import induction
from regard.claims.small_lm import small_llama
from regard.explaining.pairs import batch_of
from regard.explaining.runs import capture

COPY = induction.COPY


@pytest.fixture
def model():
    return small_llama(vocabulary=120, layers=2, heads=4, width=32, seed=1)


def test_texts_repeat_and_the_others_do_not(model):
    ids, others = induction.texts(model)
    assert ids.shape == (induction.TEXTS, 1 + 2 * COPY)
    assert torch.equal(ids[:, 1 : 1 + COPY], ids[:, 1 + COPY :])
    assert torch.equal(ids[:, 1 + COPY :], others[:, 1 + COPY :])
    assert not (ids[:, 1 : 1 + COPY] == others[:, 1 : 1 + COPY]).all(1).any()


def test_a_pair_goes_on_with_what_followed(model):
    pairs = induction.pairs(model, 6, copy=10)
    for clean, corrupt, target, foil in zip(
        pairs.clean.ids.tolist(), pairs.corrupt.ids.tolist(), pairs.target.tolist(), pairs.foil.tolist()
    ):
        assert clean[clean.index(clean[-1]) + 1] == target != foil and foil in clean[1:11]
        assert clean[11:] == corrupt[11:] == clean[1:6] and clean[1:11] != corrupt[1:11]


def test_heads_are_ablated_in_the_second_copy_alone(model):
    ids, others = induction.texts(model)
    given = {q: dict(x) for q, x in capture(model, batch_of(others.tolist()), ["z"])[1].items()}
    own = capture(model, batch_of(ids.tolist()), ["z"])[1]
    first, second = induction.copied(model, ids)
    every = [(n, h) for n in range(2) for h in range(4)]
    assert induction.copied(model, ids, induction.in_second_copy(every, own)) == pytest.approx(
        (first, second)
    )
    changed = induction.copied(model, ids, induction.in_second_copy([(1, 2), (0, 1)], given))
    assert changed[0] == pytest.approx(first, rel=1e-6) and abs(changed[1] - second) > 1e-5
    # with all heads as they were after other tokens the second copy is predicted as it was there
    every_one = induction.copied(model, ids, induction.in_second_copy(every, given))
    assert every_one[1] == pytest.approx(induction.copied(model, others)[1], rel=1e-5)


def test_losses_are_those_of_the_tokens_that_are_said(model):
    ids, _ = induction.texts(model)
    with torch.no_grad():
        log = model(ids).logits.log_softmax(-1)
    said = -log[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    first, second = induction.copied(model, ids)
    # u_2 ... u_50 are at 2 ... 50 and, again, at 52 ... 101
    assert first == pytest.approx(said[:, 1:50].mean().item(), rel=1e-5)
    assert second == pytest.approx(said[:, 51:100].mean().item(), rel=1e-5)


def test_findings_count_the_heads_of_a_circuit(model, monkeypatch):
    made = torch.full((2, 4), 0.1, dtype=torch.float64)
    made[1, 3], made[0, 2] = 0.9, 0.5
    monkeypatch.setattr(induction, "scores", lambda model: made)
    found = induction.findings(model, [(1, 3), (1, 0), (0, 1)])
    assert found["top_heads"][:2] == [[1, 3], [0, 2]] and found["heads"] == 2
    assert found["shared"] == 1 and found["shared_chance"] == pytest.approx(3 * 2 / 8)
    assert found["shared_chance_within_layers"] == pytest.approx(3 / 4)
    assert found["gain"] == pytest.approx(found["loss_first_copy"] - found["loss_second_copy"])
    assert len(found["gain_without_random_heads_by_draw"]) == induction.DRAWS
