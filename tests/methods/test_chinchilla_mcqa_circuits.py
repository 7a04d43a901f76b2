"""Direct effects add up to the difference of logits; projected queries and keys are what a model attends with."""

import pytest
import torch

from regard.claims.small_lm import small_gpt2
from regard.claims.tracing import chinchilla_mcqa_circuits as claim
from regard.core import Observer, Site
from regard.explaining.runs import forward
from regard.methods.tracing.chinchilla_mcqa_circuits import Config, axes_of, measure


@pytest.fixture
def model():
    return small_gpt2(claim.VOCABULARY, 4, 8, 64, claim.TOKENS, seed=3)


def asked(seed, any_letters=False):
    return claim.choices(claim.knowledge(3), 16, torch.Generator().manual_seed(seed), any_letters)


def test_the_difference_of_logits_is_the_models(model):
    choice = asked(0)
    with torch.no_grad():
        logits, _ = forward(model, choice.batch)
    wanted = logits.gather(1, choice.right[:, None])[:, 0] - logits.gather(1, choice.wrong).mean(1)
    heads, mlps, whole = claim.effects(model, choice)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    assert heads.shape == (16, 32) and mlps.shape == (16, 4)  # what is left is of the embedding and of biases


def test_projected_queries_and_keys_are_what_is_attended_with(model):
    heads, choice = [(1, 2), (2, 0)], asked(1, any_letters=True)
    known = claim.spaces(model, asked(0), heads, 3)
    look = [Observer("value", Site(q, tower="text"), name=q) for q in ("q", "k")]
    with torch.no_grad():
        _, plain = forward(model, choice.batch, look)
        _, edited = forward(model, choice.batch, [*claim.projecting(known), *look])
    before, after = ({q: {n: x for n, _, x in a.records[q]} for q in "qk"} for a in (plain, edited))
    rows = list(claim.LABELS)
    wanted = known["k", 1, 2].project(before["k"][1][:, 2, rows])
    torch.testing.assert_close(after["k"][1][:, 2, rows], wanted, rtol=1e-4, atol=1e-6)
    others = [i for i in range(choice.ids.shape[1]) if i not in rows]
    assert torch.equal(after["k"][1][:, 2, others], before["k"][1][:, 2, others])
    last = after["q"][2][:, 0, -1]
    torch.testing.assert_close(known["q", 2, 0].project(last), last, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(before["q"][2][:, 0, -1], last, atol=1e-5)


def test_all_axes_change_nothing_and_centred_labels_have_three():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 8, generator=g, dtype=torch.float64)
    torch.testing.assert_close(axes_of(x, 8).project(x), x)
    four = torch.randn(1, 4, 8, generator=g, dtype=torch.float64).expand(6, -1, -1)
    torch.testing.assert_close(axes_of(four, 3).project(four), four)
    with pytest.raises(ValueError, match="as many vectors"):
        axes_of(x, 9)


def test_prompts_of_the_claim_have_one_right_choice():
    known = claim.knowledge(3)
    for any_letters in (False, True):
        choice = asked(4, any_letters)
        for ids, right, place in zip(choice.ids.tolist(), choice.right.tolist(), choice.place.tolist()):
            text = claim.FIRST + int(known[ids[1] - claim.QUESTION])
            at = claim.LABELS[place]
            assert (ids[at], ids[at + 1]) == (right, text) and ids.count(text) == 1 and ids.count(right) == 1
        assert choice.wrong.shape == (16, 3)
        fixed = [claim.LETTER + i for i in range(4)]
        assert (choice.ids[:, list(claim.LABELS)] == torch.tensor(fixed)).all().item() != any_letters


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank >= 1"):
        Config(rank=0)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="as many components"):
        measure(torch.randn(2, 4, 3), x, x, x[:, None], torch.randn(2, 4, 3))
