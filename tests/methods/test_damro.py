"""Outliers are what the class token attends to, and the pass beside the main one sees nothing else of the image."""

from types import SimpleNamespace

import pytest
import torch

from regard.methods.steering import damro as page


def test_outliers_of_the_layer_that_is_asked_are_what_the_pass_sees():
    attention = {-2: torch.tensor([[[0.1, 0.6, 0.3]], [[0.5, 0.1, 0.4]]])}
    cfg = page.Config(patches=1)
    memory = page.prepare({}, SimpleNamespace(class_attention=attention.__getitem__), cfg)
    (stream,) = page.streams(cfg)
    assert stream.hide == "image"
    assert stream.show(memory).tolist() == [[False, True, False], [True, False, False]]
    assert page.outliers(attention[-2].bfloat16(), 5).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a patch or more"):
        page.Config(patches=0)
    with pytest.raises(ValueError, match=r"weights of the class token"):
        page.outliers(torch.ones(2, 3), 1)
    assert page.streams(page.Config(strength=0.0)) == ()
