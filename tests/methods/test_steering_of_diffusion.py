"""Pages that steer a diffusion transformer, in the small one that claims train: here with weights as they are drawn."""

import pytest
import torch

from regard.claims import toy_diffusion as toy
from regard.claims.lab import generator
from regard.methods.steering import edit_a_video, ir_diffusion, prime_composer, refam
from regard.ops.steered import Steered


def drawn(seed=0, count=3, **settings):
    scene = toy.scenes(count, generator(seed), "test", **settings)
    return toy.ToyDiffusion(seed), scene, 2 * toy.patches_of(scene.images) - 1


def test_patches_and_pixels_are_the_same_picture():
    _, scene, _ = drawn()
    assert torch.equal(toy.images_of(toy.patches_of(scene.images)), scene.images)
    assert (scene.digits[:, 0] != scene.digits[:, 1]).all()
    assert not (scene.ink[:, 0] & scene.ink[:, 1]).any() and scene.ink.any(-1).all()


@pytest.mark.parametrize(
    "page", [refam, prime_composer, ir_diffusion, edit_a_video], ids=lambda page: page.__name__
)
def test_neutral_changes_no_bit_and_other_settings_do(page):
    model, scene, x = drawn()
    t, half = torch.full((len(x),), 0.5), torch.arange(toy.PATCHES) < toy.PATCHES // 2
    patch_roles = {"region": half[None], "subject_0": half[None], "subject_1": ~half[None]}
    word_roles = {"subject": torch.arange(toy.WORDS)[None] == 0, "magnet": torch.arange(toy.WORDS)[None] == 1}
    memory = prime_composer.Composing(0.0, {0: torch.zeros(len(x), toy.HEADS, toy.PATCHES, toy.PATCHES)})
    plain = model(x, t, scene.words)
    settings = {"refam": {"sink": 0.05, "deep": 0.0}}.get(page.__name__.rpartition(".")[2], {})
    for given, same in ((page.METHOD.card.neutral, True), (settings, False)):
        cfg = page.METHOD.configure(**given)
        edit = toy.steering(page.METHOD, cfg, patch_roles, word_roles, memory)
        assert torch.equal(model(x, t, scene.words, edit), plain) == same


def test_a_frame_hears_of_the_first_and_the_one_before_alone():
    g, frames, each = generator(1), 4, 3
    n = frames * each
    scores, values = torch.randn(1, 1, n, n, generator=g), torch.randn(1, 1, n, 2, generator=g)
    image = torch.ones(1, n, dtype=torch.bool)
    at = Steered(layer=0, layers=1, phase="prefill", role=lambda _: image, row_role=lambda _: image)
    weights = edit_a_video.scores(at, scores, edit_a_video.Config(frames=frames)).softmax(-1)
    for frame in range(frames):
        changed = values.clone()
        changed[:, :, frame * each : (frame + 1) * each] += 1
        moved = ((weights @ changed) != (weights @ values)).any(-1).view(frames, each).all(-1)
        assert moved.tolist() == edit_a_video.frames_seen(frames)[:, frame].tolist()
    with pytest.raises(ValueError, match="equally many"):
        edit_a_video.scores(at, scores, edit_a_video.Config(frames=5))


def test_what_is_moved_to_a_box_of_its_size_comes_back_whole():
    x = torch.randn(2, 3, 64, 5, generator=generator(2))
    there = ir_diffusion.moved(x, (8, 8), (0, 0, 4, 4), (2, 3, 4, 4))
    back = ir_diffusion.moved(there, (8, 8), (2, 3, 4, 4), (0, 0, 4, 4)).unflatten(2, (8, 8))
    assert torch.equal(back[:, :, :4, :4], x.unflatten(2, (8, 8))[:, :, :4, :4])
    assert ir_diffusion.box_of((torch.arange(12) == 5) | (torch.arange(12) == 10), (3, 4)) == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="within the grid"):
        ir_diffusion.moved(x, (8, 8), (5, 0, 4, 4), (0, 0, 4, 4))
