"""What stays of a picture with one bright thing is that thing, enlarged; a whole picture stays as it was."""

from types import SimpleNamespace

import pytest
import torch

from regard.methods.steering import carve as page


def maps(at: list[int], tokens: int = 16) -> torch.Tensor:
    """[2, 1, tokens] of attention that is even but for these tokens."""
    found = torch.ones(2, 1, tokens)
    found[..., at] = 9.0
    return found


def test_the_thing_that_the_question_attends_to_is_enlarged():
    pixels = torch.arange(256.0).view(1, 16, 16)
    found = page.measure(maps([5]), maps([]), pixels, (4, 4), page.Config(share=1 / 16, regions=1))
    top, bottom, left, right = found.box
    assert 3 <= top < bottom <= 9 and 3 <= left < right <= 9
    assert found.pixels.shape == pixels.shape
    assert found.pixels.max() <= pixels[:, top:bottom, left:right].max()


def test_what_both_attend_to_does_not_count():
    pixels = torch.zeros(3, 16, 16)
    found = page.measure(maps([5, 15]), maps([15]), pixels, (4, 4))
    assert int(found.fused.argmax()) == 5


def test_hook_asks_both_and_keeps_a_whole_picture_to_the_last_bit():
    asked = []
    attention = lambda text: asked.append(text) or maps([5])  # noqa: E731
    run = SimpleNamespace(attention=attention, pixels=torch.randn(1, 3, 16, 16).bfloat16(), grid=(4, 4))
    assert torch.equal(page.images(run, page.Config(share=1.0)), run.pixels)
    assert asked == [None, page.Config().general]
    changed = page.images(run, page.Config())
    assert changed.shape == run.pixels.shape and changed.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="are the tokens"):
        page.measure(maps([5]), maps([5]), torch.zeros(3, 16, 16), (4, 5))
