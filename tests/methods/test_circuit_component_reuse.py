"""Overlap of heads against permutations that are drawn, ties that tell nothing, and what is refused."""

import random
from dataclasses import replace

import pytest
import torch

from regard.claims.small_lm import small_llama
from regard.claims.tracing import circuit_component_reuse as claim
from regard.explaining.runs import forward
from regard.methods.tracing.circuit_component_reuse import Config, measure, ranked


@pytest.mark.parametrize("within", ["model", "layer"])
def test_chance_and_p_are_those_of_permutations_that_are_drawn(within):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(3, 4, generator=g)
    b = a + torch.randn(3, 4, generator=g)
    found = measure(a, b, Config(within=within))
    first, second = set(ranked(a)[:5].tolist()), ranked(b, last=True)[:5]
    draws = torch.rand(4000, 12, generator=g)
    if within == "layer":
        draws = draws + torch.arange(3).repeat_interleave(4)
    common = [sum(int(h) in first for h in order[second]) for order in draws.argsort(1)]
    drawn = torch.tensor(common).double() / 5
    assert found.chance[4].item() == pytest.approx(drawn.mean().item(), abs=0.02)
    now = found.overlap[4].item()
    assert found.p[4].item() == pytest.approx((drawn >= now - 1e-9).double().mean().item(), abs=0.03)


def test_heads_that_tell_nothing_overlap_no_more_than_they_must():
    nothing = measure(torch.zeros(2, 5), torch.zeros(2, 5))
    assert nothing.overlap[:5].tolist() == [0] * 5 and nothing.overlap[-1] == 1
    assert nothing.p[:5].tolist() == pytest.approx([1.0] * 5)


def test_a_share_is_a_number_of_heads_and_the_same_scores_overlap_wholly():
    a = torch.arange(32.0).view(4, 8)
    found = measure(a, a)
    assert found.at(0.1) == {
        "heads": 3,
        "overlap": 1,
        "chance": pytest.approx(3 / 32),
        "p": pytest.approx(1 / 4960),
    }
    assert found.at(0.001)["heads"] == 1
    with pytest.raises(ValueError, match="0 < share <= 1"):
        found.at(0)


def test_what_is_no_pair_of_scores_is_refused():
    with pytest.raises(ValueError, match="score for each of the same heads"):
        measure(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="every head has a score"):
        measure(torch.full((1, 2), torch.nan), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="within is one of"):
        Config(within="head")


def test_prompts_of_the_claim_have_their_answers():
    """The word of the kind that is asked for stands in the list, and the foil, of another kind, beside it."""
    for task in (0, 1):
        pairs = claim.pairs_of(task, seed=5)
        first = claim.FIRST + task * claim.TOKENS
        for ids, target, foil in zip(pairs.clean.ids.tolist(), pairs.target.tolist(), pairs.foil.tolist()):
            kind = (ids[-1] if task == 0 else ids[-2]) - first
            assert (target - first - claim.KINDS) // claim.WORDS == kind and target in ids
            assert foil in ids and foil != target
        ids, labels = claim.lesson(task, 6, torch.Generator().manual_seed(0))
        where = labels >= 0
        assert where.sum(1).tolist() == [claim.TURNS] * 6
        assert torch.equal(labels[where], ids.roll(-1, 1)[where])


def test_prompts_in_words_ask_for_what_is_left_over():
    rng = random.Random(4)
    for _ in range(30):
        clean, corrupt, target, foil = claim.names(rng)
        for text, left, said in ((clean, target, foil), (corrupt, foil, target)):
            words = text.replace(",", "").split()
            assert (words.count(left), words.count(said)) == (1, 2)
        clean, corrupt, target, foil = claim.colours(rng)
        for text, left, said in ((clean, target, foil), (corrupt, foil, target)):
            words = text.replace(",", "").replace(".", "").split()
            assert (words.count(left), words.count(said)) == (1, 2)
            # the object that is asked for, the last word but one, stands after its colour
            assert words[words.index(left) + 1] == words[-2]
        assert len(clean.split()) == len(corrupt.split())


@pytest.mark.parametrize("mlps", ["free", "frozen"])
def test_the_last_token_alone_gives_what_path_patching_of_whole_prompts_gives(mlps):
    model = small_llama(claim.VOCABULARY, 3, 4, 32, seed=2)
    pairs = claim.pairs_of(0, seed=6).at(range(5))
    wanted = claim.scores(model, pairs, mlps)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(claim.direct(model, pairs, mlps), wanted, rtol=1e-4, atol=1e-5)


def test_other_heads_are_as_many_and_losses_are_of_the_heads_that_are_named():
    model, shared = small_llama(claim.VOCABULARY, 2, 4, 32, seed=2), [(0, 1), (1, 0), (1, 1), (1, 3)]
    draws = claim.from_any_layer(shared, torch.Size((2, 4)), 3)
    assert all(len({*heads}) == 4 and not {*heads} & {*shared} for heads in draws)
    pairs = claim.pairs_of(1, seed=6).at(range(8))
    said, instead = (forward(model, side)[0].argmax(-1) for side in (pairs.clean, pairs.corrupt))
    assert not torch.equal(said, instead)
    # prompts end alike, so with all heads as on the corrupted prompts the model says what it says there
    every = [(n, h) for n in range(2) for h in range(4)]
    assert claim.accuracies(model, replace(pairs, target=instead), [every]) == [100]
    sure = replace(pairs, target=said)
    found = claim.losses(model, shared, [sure], torch.Size((2, 4)), 3)
    assert found["accuracy"] == [100] and found["heads_same_layers"] == 2
    assert found["drop_shared"] == [100 - claim.accuracies(model, sure, [shared])[0]]
    assert found["drop_any_layer"] == [100 - sum(claim.accuracies(model, sure, draws)) / 3]
