"""What components write adds up to the logits of a model; heads that cannot be told apart are refused."""

import pytest
import torch

from regard.claims.small_lm import small_llama
from regard.claims.tracing import factual_recall_mechanisms as claim
from regard.explaining.runs import capture
from regard.methods.tracing.factual_recall_mechanisms import Config, Recall, measure, written


def test_heads_mlps_and_the_embedding_write_the_logits():
    model, table = small_llama(claim.VOCABULARY, 4, 4, 64, seed=3, tied=True), claim.facts(3)
    batch, subject, _ = claim.questions(table, 1)
    with torch.no_grad():
        logits, values = capture(model, batch, ("z", "mlp", "resid_pre", "resid_post"))
        parts = claim.in_residual(model, values).flatten(1, 2)
        parts = torch.cat([parts, claim.last(values, "mlp"), values["resid_pre"][0][:, 0, -1:]], 1)
        found = claim.along(model, parts, values["resid_post"][3][:, 0, -1], subject)
    wanted = (logits - logits.mean(-1, keepdim=True)).gather(1, subject[:, None])[:, 0]
    torch.testing.assert_close(found.sum(1), wanted, rtol=1e-4, atol=1e-5)


def test_it_is_torchs_layer_norm_but_for_its_shift():
    g = torch.Generator().manual_seed(0)
    parts, u = torch.randn(3, 4, 6, generator=g), torch.randn(6, generator=g)
    norm = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    found = written(parts, parts.sum(1), u, norm.weight.detach(), Config("layer", norm.eps))
    torch.testing.assert_close(found.sum(1), norm(parts.sum(1)).detach() @ u)


def test_what_cannot_be_told_apart_is_refused():
    g = torch.Generator().manual_seed(0)
    heads, mlp, x, u = (torch.randn(*s, generator=g) for s in ((5, 2, 4), (5, 4), (5, 4), (4,)))
    with pytest.raises(ValueError, match="each in a way of its own"):
        measure(heads[:, :1].expand(-1, 2, -1), mlp, x, u)
    with pytest.raises(ValueError, match="each in a way of its own"):
        measure(heads[:1].expand(5, -1, -1), mlp, x, u)
    with pytest.raises(ValueError, match="varies from prompt to prompt"):
        measure(heads, mlp[:1].expand(5, -1), x, u)
    with pytest.raises(ValueError, match="a head that writes for"):
        Recall(-torch.ones(2, 3), u, u, u).share(1)
    assert Recall(torch.tensor([[3.0, 1.0, -2.0]]), u, u, u).share(1) == 0.75


def test_sentences_of_the_claim_are_true():
    table = claim.facts(2)
    ids, labels = claim.lesson(table, torch.Generator().manual_seed(0))
    assert torch.equal(labels[:, :-1][labels[:, :-1] >= 0], ids[:, 1:][labels[:, :-1] >= 0])
    for text in ids.tolist():
        for at in (i for i, t in enumerate(text) if t == claim.IS):
            after = text[at + 1 :]
            answer = after[1] if claim.FILLER <= after[0] < claim.RELATION else after[0]
            relation, subject = text[at - 3] - claim.RELATION, text[at - 1] - claim.SUBJECT
            assert answer == table[subject, relation]
    batch, subject, answer = claim.questions(table, 0)
    assert torch.equal(batch.ids[:, 4], subject) and answer[5] == table[2, 1]
