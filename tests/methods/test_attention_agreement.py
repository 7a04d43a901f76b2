"""What a token adds to another, head by head, is all that attention adds; the control's word decides alone."""

import pytest
import torch

from regard.claims.findings import attention_agreement as claim
from regard.claims.lab import generator, seeded


def test_the_additions_of_all_tokens_are_what_attention_adds():
    with seeded(0):
        layer = claim.Layer()
    x = torch.randn(2, 7, claim.WIDTH, generator=generator(1))
    weights, v = layer.heads(x)
    mixed = layer.out((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer.added(x).sum(2) + layer.out.bias, mixed, atol=1e-5)
    # of one head alone: the weights of another head do not act on its slice
    layer.out.weight.data[:, claim.WIDTH // claim.HEADS :] = 0
    only = torch.einsum("bij,bje,de->bijd", weights[:, 0], v[:, 0], layer.out.weight[:, : v.shape[-1]])
    assert torch.allclose(layer.added(x), only, atol=1e-5)


def test_attention_is_over_words_and_from_the_classifier_token():
    with seeded(0):
        model = claim.Transformer(30)
    words = torch.randint(30, (3, claim.WORDS), generator=generator(2))
    found = model.attention(model.embed(words))
    assert all(scores.shape == (3, claim.WORDS) for scores in found.values())
    x = model.layers[0](model.begin(model.embed(words)))
    weights = model.layers[1].heads(x)[0]
    own = weights[:, :, 0, 0].mean(1)  # what the classifier token gives itself is not ranked
    assert torch.allclose(found["attention"].sum(1) + own, torch.ones(3), atol=1e-5)
    assert torch.allclose(found["attention"][:, 4], weights[:, :, 0, 5].mean(1), atol=1e-6)


def test_passages_for_testing_are_not_in_the_blocks_for_training():
    data = claim.texts()
    for train, test in zip(data.train, data.test, strict=True):
        assert not (train[:, None] == test[None]).all(-1).any() and len(train) > 3 * len(test)
    words, classes = data.draw(40, generator(0), "test")
    assert words.shape == (40, claim.WORDS) and 0 < classes.sum() < 40 and int(words.max()) < data.size


def test_the_planted_word_decides_alone():
    words, classes = claim.planted(500, generator(0))
    first, second = ((words == word).sum(1) for word in claim.PLANTED)
    assert torch.equal(second, classes) and torch.equal(first + second, torch.ones(500, dtype=torch.long))


def test_correlations_and_agreements_of_known_rankings():
    up = torch.arange(6.0).expand(5, -1)
    scores = {"up": up, "down": -up, "same": up**2, "ties": (up > 2).float()}
    taus = claim.rank_correlations(scores)
    assert taus["up/same"] == pytest.approx([1, 1, 1]) and taus["up/down"] == pytest.approx([-1, -1, -1])
    # tau-b: nine pairs of one group with the other of fifteen, over the root of 15 times 9
    assert abs(taus["up/ties"][0] - 9 / (15 * 9) ** 0.5) < 1e-9
    agree = claim.agreements(scores)
    assert agree["up/same"] == 1 and agree["up/down"] == 0
