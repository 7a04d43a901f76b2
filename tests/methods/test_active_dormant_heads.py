"""The law of the texts of active_dormant_heads, its two kinds of attention, and what counts as a share."""

from collections import Counter
from itertools import pairwise

import torch

from regard.claims.findings import active_dormant_heads as claim
from regard.tasks import held_out
from regard.testing import zoo


def test_after_a_trigger_the_token_before_it_comes_again():
    x = claim.texts(300, torch.Generator().manual_seed(0))
    assert (x[:, 0] == claim.FIRST).all() and (x[:, 1] >= claim.TRIGGERS).all()
    trigger = x < claim.TRIGGERS
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    before, after = x[:, :-2][trigger[:, 1:-1]], x[:, 2:][trigger[:, 1:-1]]
    assert torch.equal(before, after) and len(after) > 1000


def test_the_bigram_table_is_that_of_the_text():
    text = held_out().text[: len(held_out().text) // 10_000 * 10_000]
    known = [c for c, _ in Counter(text).most_common(claim.KNOWN)]
    kept = [c for c in text if c in known]
    pairs = Counter(pairwise(kept))
    p = claim.bigram()
    for a in (0, 1, 5):
        counts = torch.tensor([float(pairs[known[a], b]) for b in known]).double()
        torch.testing.assert_close(p[a, :10], (counts / counts.sum())[:10], atol=0.03, rtol=0)


def test_elsewhere_the_bigram_table_is_followed():
    p = claim.bigram()
    torch.testing.assert_close(p.sum(1), torch.ones(claim.KNOWN, dtype=torch.float64))
    x = claim.texts(2000, torch.Generator().manual_seed(0))
    seen, after = x[:, 1:-1].flatten(), x[:, 2:].flatten()
    common = seen[seen >= claim.TRIGGERS].mode().values
    drawn = after[seen == common].bincount(minlength=claim.KNOWN).double()
    torch.testing.assert_close(drawn / drawn.sum(), p[common], atol=0.03, rtol=0)


def test_attention_looks_back():
    scores = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    later = scores + torch.ones(9, 9).triu(1)
    for relu in (False, True):
        weights = claim.attention(scores, relu)
        assert torch.equal(weights, claim.attention(later, relu)) and (weights.triu(1) == 0).all()
    torch.testing.assert_close(claim.attention(scores, False).sum(-1), torch.ones(2, 9))


def test_a_share_is_of_what_a_row_spends():
    weights = torch.tensor([[[2.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 0.5]]])
    share, spends = claim.shares(weights)
    assert share.tolist() == [[1.0, 0.25], [0.0, 0.0]]
    assert spends.tolist() == [[True, True], [False, True]]


def test_bounds_are_those_of_every_seed():
    softmax = {"share_non_trigger": 0.9, "share_trigger": 0.0, "value_ratio": 0.1, "right_trigger": 1.0}
    relu = softmax | {"share_non_trigger": 0.1}
    assert all(claim.bounds({"softmax": [softmax] * 2, "relu": [relu] * 2}).values())
    for side, part, fault in (
        ("softmax", "dormant", {"share_non_trigger": 0.69}),
        ("softmax", "active", {"share_trigger": 0.31}),
        ("softmax", "values", {"value_ratio": 0.51}),
        ("softmax", "copies", {"right_trigger": 0.9}),
        ("relu", "copies", {"right_trigger": 0.9}),
        ("relu", "relu", {"share_non_trigger": 0.46}),
    ):
        found = {"softmax": [softmax, softmax], "relu": [relu, relu]}
        found[side] = [found[side][0], found[side][1] | fault]
        assert {name for name, holds in claim.bounds(found).items() if not holds} == {part}, (side, fault)


def test_weights_on_the_first_token_and_values_are_those_of_transformers():
    model = zoo.build("llama")[0]
    ids = zoo.ids(2, 12)
    mass, ratio = claim.on_first(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    torch.testing.assert_close(
        mass, torch.stack([a[..., 0] for a in out.attentions], 1), atol=1e-5, rtol=1e-4
    )
    norms = torch.stack([layer.values.norm(dim=-1) for layer in out.past_key_values.layers], 1)
    torch.testing.assert_close(ratio, norms[..., 0] / norms[..., 1:].median(-1).values, atol=1e-5, rtol=1e-4)
