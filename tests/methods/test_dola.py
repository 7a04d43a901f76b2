"""DoLa's candidate layers, and what it makes of a model of text."""

import pytest
import torch

from regard import attach
from regard.methods.steering import dola as page
from regard.testing.zoo import build


def test_candidates_are_every_second_layer_of_a_part_of_the_depth():
    assert page.candidates(32, page.Config(start=0.0, stop=0.5)) == [2, 4, 6, 8, 10, 12, 14]
    assert page.candidates(3, page.Config()) == [2]
    with pytest.raises(ValueError, match="an earlier layer or more"):
        page.candidates(1, page.Config())


def test_the_last_layer_is_contrasted_with_the_one_that_differs_most():
    model, inputs = build("llama")
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with attach(model, "dola", start=0.0, every=1):
            found = model(**inputs).logits[0, -1]
    p = plain.logits[0, -1].softmax(-1)
    others = [model.lm_head(model.model.norm(h[0, -1])).softmax(-1) for h in plain.hidden_states[1:-1]]

    def kl(a, b):
        return (a * (a / b).log()).sum()

    q = max(others, key=lambda q: kl(p, (p + q) / 2) + kl(q, (p + q) / 2))
    kept = p >= 0.1 * p.max()
    assert torch.equal(found.isfinite(), kept)
    assert torch.allclose(found[kept], (p / q).log()[kept], atol=1e-4)
