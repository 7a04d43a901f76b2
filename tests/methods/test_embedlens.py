"""Tokens that are taken out are as if they were not there; those that enter later are not seen before."""

import pytest
import torch

from regard import attach
from regard.core import Observer, Site
from regard.methods.tracing import embedlens as page
from regard.testing.zoo import build

VISUAL = (2, 3, 4, 5)


def logits(edits, **inputs):
    model, given = build("llama")
    with torch.no_grad(), attach(model, list(edits) or None):
        return model(**{**given, **inputs}).logits


def test_hidden_tokens_are_as_good_as_absent():
    _, given = build("llama")
    ids = given["input_ids"]
    drop = torch.tensor([[True, False, True, False]] * len(ids))
    left = [n for n in range(ids.shape[1]) if n not in (2, 4)]
    absent = logits([], input_ids=ids[:, left], position_ids=torch.tensor([left]), attention_mask=None)
    hidden = logits(page.hiding(drop, VISUAL))
    assert torch.allclose(hidden[:, left], absent, atol=1e-5)
    assert page.hiding(drop & False, VISUAL) == []


def test_tokens_enter_a_layer_as_they_were():
    model, given = build("llama")
    seen = Observer("value", Site("resid_pre", layers=1, tower="text"), name="seen")
    with torch.no_grad(), attach(model, [*page.entering(1, VISUAL), seen]) as attached:
        model(**given)
    (_, _, states), *_ = attached.records["seen"]
    embedded = model.get_input_embeddings()(given["input_ids"])
    assert torch.allclose(states[:, 2:6], embedded[:, 2:6], atol=1e-6)
    assert page.entering(0, VISUAL) == []


def test_bad_input_is_refused():
    x = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="as wide as the words"):
        page.measure(x, torch.ones(4, 2), x)
    with pytest.raises(ValueError, match="nearest words"):
        page.measure(x, torch.ones(2, 3), x)
