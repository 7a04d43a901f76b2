"""Neighbour-aware attention: pairs counted by hand on the paper's grid, a slow loop on several images."""

import pytest
import torch

from regard import attach
from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.masks import yopo
from regard.testing.zoo import build


def grid(height, width):
    patch = torch.arange(height * width)
    return Roles(image=torch.ones_like(patch), y=patch // width, x=patch % width)


def test_pairs_of_a_window_of_5_on_24_x_24():
    """On a line of 24 places 24 + 2 · 23 + 2 · 22 = 114 ordered pairs lie within 2: 114² on the grid, half of them
    causal, and the patches themselves."""
    dense = yopo.build(yopo.Config()).dense(576, roles=grid(24, 24))
    assert int(dense.sum()) == (114**2 - 576) // 2 + 576 == 6786
    both = dense | dense.mT  # the released code's block, which is not causal
    assert int(both.sum()) == 114**2


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_several_images_of_different_grids_by_a_slow_loop(radius, across):
    # a word, 2 x 3 patches, two words, 3 x 2 patches, and right after them a crop of 1 x 2, a word
    image = [0] + [1] * 6 + [0, 0] + [2] * 6 + [3] * 2 + [0]
    y = [-1, 0, 0, 0, 1, 1, 1, -1, -1, 0, 0, 1, 1, 2, 2, 0, 0, -1]
    x = [-1, 0, 1, 2, 0, 1, 2, -1, -1, 0, 1, 0, 1, 0, 1, 0, 1, -1]
    dense = yopo.build(yopo.Config(radius, across)).dense(len(image), roles=Roles(image=image, y=y, x=x))[
        0, 0
    ]
    for i in range(len(image)):
        for j in range(len(image)):
            free = image[i] == 0 or image[j] == 0 or (across and image[i] != image[j])
            near = image[i] == image[j] and abs(y[i] - y[j]) <= radius and abs(x[i] - x[j]) <= radius
            assert bool(dense[i, j]) == (j <= i and (free or near)), (i, j)


def test_a_radius_that_covers_the_grid_is_causal_attention():
    for radius, same in ((3, True), (2, False)):
        dense = yopo.build(yopo.Config(radius)).dense(12, roles=grid(3, 4))
        assert torch.equal(dense, causal().dense(12)) == same


def test_attached_to_a_causal_model_only_patches_are_narrowed():
    """Tokens 1 to 9 of a prompt stand for a grid of 3 x 3; its first patch has no later neighbour to miss."""
    model, _ = build("llama")
    ids = torch.arange(3, 17)[None]
    at = torch.arange(ids.shape[1])
    patch = (at >= 1) & (at < 10)
    labels = {"image": patch.long(), "y": torch.where(patch, (at - 1) // 3, -1),
              "x": torch.where(patch, (at - 1) % 3, -1)}  # fmt: skip
    roles = {name: (lambda ids, label=label: label.expand(ids.shape)) for name, label in labels.items()}
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states[1]
        with attach(model, "yopo", radius=2, roles=roles):
            wide = model(ids, output_hidden_states=True).hidden_states[1]
        with attach(model, "yopo", radius=0, roles=roles):
            alone = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(wide, plain)
    moved = (alone - plain).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False] + [True] * 8 + [False] * 4
