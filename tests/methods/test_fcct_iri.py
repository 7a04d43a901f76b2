"""Edits of IRI put the injected outputs at the last token of targets, and nothing anywhere at strength 0."""

import pytest
import torch

from regard import attach
from regard.core import Observer, Site
from regard.explaining.pairs import Batch
from regard.explaining.runs import capture
from regard.methods.tracing import fcct_iri as page
from regard.testing.zoo import build

RATES = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([[0.1, 0.9, 0.6]])


def found(component, strength):
    model, inputs = build("llama")
    ids = inputs["input_ids"]
    _, values = capture(model, Batch(ids, torch.ones_like(ids)), [component])
    outputs = torch.stack([x[:, 0, -1] for _, x in sorted(values[component].items())])
    cfg = page.Config(sources=2, targets=3, strength=strength)
    return model, ids, outputs, page.measure(*RATES, outputs, cfg)


@pytest.mark.parametrize("component", page.COMPONENTS)
def test_targets_with_a_source_before_them_take_it_at_the_last_token(component):
    model, ids, outputs, injection = found(component, 0.5)
    assert injection.sources == (1, 2) and injection.targets == (0, 1, 2)
    edits = page.edits(injection, component)
    assert [edit.site.layers for edit in edits] == [(2,)]
    observer = Observer("value", Site(component, layers=2, tower="text"))
    with torch.no_grad(), attach(model, observer) as before:
        plain = model(input_ids=ids).logits
    with torch.no_grad(), attach(model, [*edits, observer]) as after:
        changed = model(input_ids=ids).logits
    (old,), (new,) = ([x for _, _, x in next(iter(a.records.values()))] for a in (before, after))
    mixed = outputs[2] + 0.5 * 0.9 * outputs[1]
    wanted = mixed / mixed.norm(dim=-1, keepdim=True) * outputs[2].norm(dim=-1, keepdim=True)
    assert torch.allclose(new[:, -1], wanted, atol=1e-6)
    assert torch.equal(new[:, :-1], old[:, :-1])
    assert not torch.allclose(changed[:, -1], plain[:, -1])


def test_strength_zero_changes_nothing():
    model, ids, outputs, injection = found("out", 0.0)
    assert torch.allclose(injection.outputs, outputs, atol=1e-6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with attach(model, list(page.edits(injection))):
            assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)


def test_bad_input_is_refused():
    p = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="corruption moves"):
        page.recovery(p, p, p[:, None])
    with pytest.raises(ValueError, match="patched probabilities"):
        page.recovery(p, p[:1], p[:, None])
    with pytest.raises(ValueError, match="as many layers"):
        page.measure(*RATES, torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="component"):
        page.edits(page.measure(*RATES, torch.ones(3, 1, 4)), "z")
