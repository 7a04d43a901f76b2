"""The probe beside scikit-learn's, the scores beside what heads add to the residual, the texts of the claim."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from regard.attaching.attachment import attach
from regard.claims.tracing.refusal_cliff import (
    COMPLY,
    FLAGS,
    GIVE_IN,
    PLATEAU,
    REFUSE,
    heads_at_the_end,
    states,
    texts,
    untrained,
)
from regard.core import Observer, Site
from regard.explaining.sources import output_matrices
from regard.methods.tracing import refusal_cliff as page


@pytest.mark.parametrize("apart", [0.0, 10.0])
def test_the_probe_is_scikit_learns(apart):
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, generator=g) < 0.3).long()
    x = torch.randn(60, 4, generator=g, dtype=torch.float64) + apart * labels[:, None]
    weight, bias = page.fit_probe(x, labels, page.Config(penalty=0.02))
    sklearn = LogisticRegression(C=1 / (0.02 * 60), tol=1e-12, max_iter=10_000).fit(x.numpy(), labels.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(sklearn.coef_[0]), atol=1e-5, rtol=1e-5)
    assert abs(bias.item() - sklearn.intercept_[0]) < 1e-4


def test_one_label_alone_is_refused():
    with pytest.raises(ValueError, match="both labels"):
        page.fit_probe(torch.ones(3, 2), torch.ones(3), page.Config())


def test_scores_of_a_layer_add_up_to_what_attention_writes_at_the_last_token():
    model, some = untrained(0), texts(5, torch.Generator().manual_seed(1))
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    out = torch.stack([*output_matrices(model).values()])
    scores = page.head_scores(heads_at_the_end(model, some), out, direction)
    with torch.no_grad(), attach(model, Observer("value", Site("out"), name="out")) as attached:
        model(input_ids=some.ids, use_cache=False)
    for layer, _, written in attached.records["out"]:
        wanted = (written[:, -1] @ direction / direction.norm()).mean()
        torch.testing.assert_close(scores[layer].sum(), wanted, atol=1e-5, rtol=1e-4)


def test_without_heads_at_the_last_token_earlier_states_stay():
    model, some = untrained(0), texts(3, torch.Generator().manual_seed(1))
    heads, plain = [(0, 1), (0, 5), (2, 3)], states(model, some)
    last = states(model, some, page.ablate(heads, page.Config()))
    every = states(model, some, page.ablate(heads, page.Config(everywhere=True)))
    assert torch.equal(last[:, :-1], plain[:, :-1]) and not torch.equal(last[:, -1], plain[:, -1])
    assert not torch.equal(every[:, -2], plain[:, -2])


def test_texts_say_what_they_are():
    some = texts(4000, torch.Generator().manual_seed(0))
    flagged, with_word = (((some.ids >= first) & (some.ids < end)).any(1) for first, end in (FLAGS, GIVE_IN))
    assert torch.equal(flagged, some.flag) and torch.equal(with_word, some.word)
    said = [(some.ids[:, PLATEAU] == token).any(1) for token in (REFUSE, COMPLY)]
    assert not (said[0] & ~some.flag).any() and not (said[1] & some.flag).any()
    assert not ((some.ids == REFUSE) | (some.ids == COMPLY))[:, PLATEAU.stop :].any()
    for flag, word, wanted in ((True, False, 0.9), (True, True, 0.1), (False, False, 0.1)):
        rows = (some.flag == flag) & (some.word == word)
        assert abs(some.refused[rows].float().mean().item() - wanted) < 0.04
