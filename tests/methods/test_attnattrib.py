"""AttnAttrib: what its edits and its score do on models, and that its claim's prompts differ in the code alone."""

import itertools

import pytest
import torch

from regard.attaching.attachment import attach
from regard.claims.shipped_lm import samples, shipped
from regard.claims.tracing.attnattrib import corrupted, sentences, source
from regard.core import Observer, Site
from regard.explaining.tracing import answer_span
from regard.kinds.tracing import Answers
from regard.methods.tracing.attnattrib import Config, measure, score, transplant
from regard.testing.zoo import build, ids


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_transplant_carries_one_heads_output_over(family):
    model, _ = build(family)
    clean, other = ids(2, 12), ids(2, 12).flip(0)
    see = Observer("z", Site(rows=-1))
    with torch.no_grad(), attach(model, see) as attached:
        plain = model(clean).logits
    z = {layer: z for layer, _, z in attached.records["z"]}[1]
    with torch.no_grad(), attach(model, [transplant(1, 2, z[:, 2:3]), see]) as attached:
        model(other)
        got = {layer: z for layer, _, z in attached.records["z"]}[1]
    with torch.no_grad(), attach(model, transplant(1, 2, z[:, 2:3])):
        again = model(clean).logits
    assert torch.equal(got[:, 2], z[:, 2]) and not torch.equal(got[:, 1], z[:, 1])
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)  # its own output moves nothing


def test_score_counts_looks_into_the_answer():
    """A prompt of 6 tokens, the answer at 3: generated tokens and the sink are no context."""
    full = torch.zeros(1, 2, 8)
    full[0, 0, 3], full[0, 0, 6], full[0, 1, 0], full[0, 1, 5] = 0.4, 0.6, 0.9, 0.1
    answers = Answers(torch.zeros(1, 6), torch.zeros(1, 3), torch.zeros(1, 3), ((3, 4),))
    steps = [full[..., :6], full[..., :7], full]
    assert score(steps, answers).tolist() == [[1.0, 0.0]]
    sliding = [step[..., -4:] for step in steps]  # tokens 2 to 5, 3 to 6, 4 to 7
    assert score(sliding, answers).tolist() == [[pytest.approx(2 / 3), 0.0]]


def test_sinks_and_what_is_no_sentence_are_no_source():
    weights = torch.tensor([[[0.9, 0.0, 0.05, 0.05]]])
    assert measure(weights, [[(0, 2), (2, 3)]], Config()).item() == 1
    assert measure(weights, [[(0, 2), (2, 3)]], Config(sinks=0)).item() == 0
    assert measure(weights, [[(1, 2)]], Config()).item() == -1
    with pytest.raises(ValueError, match="sentences lie in the text"):
        measure(weights, [[(2, 5)]], Config())


def test_the_claims_prompts_differ_in_the_code_alone():
    tokenizer = shipped().tokenizer
    for sample in samples("recall", 256, 4, seed=3):
        first, past = answer_span(sample)
        changed = corrupted("lm", sample)
        differ = [i for i, (a, b) in enumerate(zip(sample.prompt, changed, strict=True)) if a != b]
        assert differ == list(range(first + 1, past))  # after the space
        spans = sentences("lm", sample)
        assert all(a == b for (_, a), (b, _) in itertools.pairwise(spans)) and spans[0][0] == 1
        fact = tokenizer.decode(sample.prompt[slice(*spans[source(sample, spans)])])
        assert fact.startswith("\nThe code of") and fact.endswith(".") and fact.count(".") == 1
        assert tokenizer.decode(sample.prompt[spans[-1][1] :]).startswith("\nQuestion")
