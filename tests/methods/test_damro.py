"""Outliers are what the class token attends to, and the pass beside is that of a prompt without other patches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from regard import attach
from regard.core import Method
from regard.methods.steering import damro as page
from regard.testing.pictures import IMAGE, alone, batch


def test_outliers_of_the_layer_that_is_asked_are_what_the_pass_sees():
    attention = {-2: torch.tensor([[[0.1, 0.6, 0.3]], [[0.5, 0.1, 0.4]]])}
    cfg = page.Config(patches=1)
    memory = page.prepare({}, SimpleNamespace(class_attention=attention.__getitem__), cfg)
    (stream,) = page.streams(cfg)
    assert stream.hide == "image"
    assert stream.show(memory).tolist() == [[False, True, False], [True, False, False]]
    assert page.outliers(attention[-2].bfloat16(), 5).all()


def embedded(model, inputs):
    """What the decoder is given: [1, N, d]."""
    given = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return given[0]


@torch.no_grad()
def test_the_pass_is_that_of_a_prompt_without_the_other_patches():
    model, both = batch("llava")
    seen = []

    def prepare(runs, at, cfg):
        seen.append(page.prepare(runs, at, cfg))
        return seen[-1]

    cfg = page.Config(patches=2, strength=1.0, cut=0.0)
    method = Method("damro", replace(page.METHOD, prepare=prepare), cfg)
    for text in (0, 1):
        inputs = alone(both, text)
        with attach(model, method):
            mixed = model(**inputs).logits[:, -1]
        places = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
        gone = places[~seen[-1][0]]
        left = torch.tensor([i for i in range(inputs["input_ids"].shape[1]) if i not in gone])
        assert len(places) > 2 and len(left) == inputs["input_ids"].shape[1] - len(places) + 2
        given = dict(inputs_embeds=embedded(model, inputs)[:, left], position_ids=left[None])
        without = model.lm_head(model.model.language_model(**given).last_hidden_state)[:, -1]
        assert torch.allclose(2 * model(**inputs).logits[:, -1] - mixed, without, atol=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a patch or more"):
        page.Config(patches=0)
    with pytest.raises(ValueError, match=r"weights of the class token"):
        page.outliers(torch.ones(2, 3), 1)
    assert page.streams(page.Config(strength=0.0)) == ()
