"""Thought anchors on models: the runner against transformers' eager weights, and what hiding a sentence can reach."""

import copy

import pytest
import torch

from regard.attaching.attachment import attach
from regard.claims.tracing import thought_anchors as claim
from regard.explaining.anchors import anchors, receiver_heads, sentence_attention, suppression
from regard.methods.tracing.thought_anchors import Config, effects, kurtosis, measure, receivers, suppress
from regard.ops.ranks import ranks
from regard.testing.zoo import build, ids

# with a token before, between and after them
SENTENCES = [(1, 4), (4, 5), (5, 9), (10, 13), (13, 14), (14, 18), (18, 22)]


def eager(model, text):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(other(text[None], output_attentions=True).attentions)  # [L, H, N, N]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sentence_means_are_those_of_the_eager_weights(family):
    model, _ = build(family)
    text = ids(1, 24)[0]
    weights, got = eager(model, text), sentence_attention(model, text, SENTENCES)
    for t, (a, b) in enumerate(SENTENCES):
        for s, (c, d) in enumerate(SENTENCES):
            wanted = weights[:, :, a:b, c:d].mean((2, 3))
            torch.testing.assert_close(got[:, :, t, s], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_hiding_reaches_no_sentence_before_and_each_after(family):
    model, _ = build(family)
    text = ids(1, 24)[0]
    found = suppression(model, text, SENTENCES)
    assert not found.triu(1).any()
    assert (found.tril() > 0).sum() == len(SENTENCES) * (len(SENTENCES) + 1) // 2


def test_a_hidden_sentence_is_one_that_a_mask_hides():
    """Every query but the span's own: the same logits as a text whose attention mask leaves the sentence out."""
    model, _ = build("gpt2")
    text, (first, past) = ids(1, 24), SENTENCES[2]
    mask = torch.ones_like(text)
    mask[:, first:past] = 0
    positions = torch.arange(24)[None]
    with torch.no_grad():
        wanted = model(text, attention_mask=mask, position_ids=positions).logits
        for edit in (suppress((first, past)), suppress((first, past), 24)):
            with attach(model, edit):
                got = model(text).logits
            torch.testing.assert_close(got[:, past:], wanted[:, past:], rtol=1e-4, atol=1e-5)


def test_the_runner_is_the_page():
    model, _ = build("llama")
    text, cfg = ids(1, 24)[0], Config(receivers=3, proximity=2)
    found = anchors(model, text, SENTENCES, cfg)
    weights = eager(model, text)
    mass = torch.stack([weights[..., a:b].sum(-1) for a, b in SENTENCES], -1)
    hidden = []
    with torch.no_grad():
        base = model(text[None]).logits[0]
        for span in SENTENCES:
            with attach(model, suppress(span)):
                hidden.append(model(text[None]).logits[0])
    wanted = measure(mass, base, torch.stack(hidden), SENTENCES, cfg)
    assert [list(head) for head in found.receivers] == wanted["receivers"].tolist()
    torch.testing.assert_close(found.anchors, wanted["anchors"], rtol=1e-4, atol=1e-6)
    after = torch.ones(7, 7).tril().bool()
    torch.testing.assert_close(found.effects[after], wanted["effects"][after], rtol=1e-3, atol=1e-3)
    assert receiver_heads(model, [(text, SENTENCES)], cfg) == found.receivers
    other = anchors(model, text, SENTENCES, cfg, heads=[(0, 1)])
    torch.testing.assert_close(other.anchors, found.vertical[0, 1])


def test_heads_without_kurtosis_are_no_receivers():
    flat = torch.full((5,), 0.3)
    assert kurtosis(flat).isnan()
    scores = torch.tensor([[[2.0, torch.nan], [1.0, 5.0]], [[4.0, 9.0], [7.0, -1.0]]])
    assert receivers(scores, Config()) == [(1, 0), (0, 0), (1, 1)]
    assert receivers(scores, Config(receivers=1)) == [(1, 0)]


def test_the_temperature_is_that_of_both():
    base, hidden = torch.tensor([[0.0, 1.2]]), torch.tensor([[0.0, 0.0]])
    p = torch.tensor([0.0, 2.0], dtype=torch.float64).softmax(-1)
    kl = (p * (p / 0.5).log()).sum()
    torch.testing.assert_close(
        effects(base, hidden, [(0, 1)], Config()), (kl / 1e-9 + 1).log()[None], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("sentences", [[], [(0, 2), (1, 3)], [(2, 2)], [(0, 25)]])
def test_wrong_sentences(sentences):
    model, _ = build("llama")
    with pytest.raises(ValueError, match="sentences are spans"):
        sentence_attention(model, ids(1, 24)[0], sentences)


def test_the_claims_traces_are_right():
    made = claim.traces(5, torch.Generator().manual_seed(0))
    assert claim.SENTENCES[-1][1] == made.ids.shape[1]
    for ids_, uses in zip(made.ids.tolist(), made.uses, strict=True):
        values: list[int] = []
        for t, (first, past) in enumerate(claim.SENTENCES):
            number, added, source, value, stop = ids_[first:past]
            assert number == t and stop == claim.STOP
            values.append(value - claim.STEPS)
            if t >= claim.GIVEN:
                assert source < t and uses[t].nonzero().tolist() == [[source]]
                assert values[t] == (values[source] + added - claim.STEPS) % claim.MODULUS
            else:
                assert source == claim.INPUT and not uses[t].any()


def test_ranks_share_ties():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert claim.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0])) == pytest.approx(-1)
