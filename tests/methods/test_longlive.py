"""LongLive's mask by a slow loop over frames, and the claim's model: a rolling cache is one masked pass."""

import pytest
import torch

from regard.claims.mask import longlive as claim
from regard.methods.masks import longlive as page


@pytest.mark.parametrize(
    ("frame", "sinks", "latest", "block"), [(2, 1, 3, 2), (3, 0, 2, 2), (1, 4, 5, 3), (2, 2, 1, 1)]
)
def test_the_mask_by_a_slow_loop(frame, sinks, latest, block):
    n = 31
    dense = page.build(page.Config(frame, sinks, latest, block)).dense(n)[0, 0]
    for i in range(n):
        together = [f for f in range(2 * n) if f // block == i // frame // block]  # frames of its block
        shown = {*range(sinks), *range(together[-1] - latest + 1, together[-1] + 1)}
        for j in range(n):
            assert bool(dense[i, j]) == (j // frame in shown and j // frame <= together[-1]), (i, j)


def test_a_step_of_a_long_video_reads_the_sink_and_the_latest_frames():
    dense = page.build(page.Config(frame=2, sinks=3, latest=9, block=6)).dense(2 * 60)[0, 0]
    assert dense[2 * 12 :].sum(1).eq(2 * 12).all()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return claim.Video().double().requires_grad_(False)


def test_patches_and_back():
    x = torch.rand(3, 5, 8, 8)
    patches = claim.patches_of(x)
    assert torch.equal(claim.images_of(patches), x)
    assert torch.equal(patches[1, 2, 1], x[1, 2, :4, 4:].flatten())


def test_block_by_block_is_one_masked_pass_whose_tokens_are_those_of_the_sink_and_the_window(model):
    g = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 14, 4, 16, dtype=torch.float64, generator=g)
    words = torch.tensor([[3, 10], [7, 11]])
    whole, rolling = model.read(frames, words), claim.block_by_block(model, frames, words)
    assert whole.token.tolist() == rolling.token.tolist() == [*range(8), *range(40, 56)]
    for ours, theirs in zip(whole.kv, rolling.kv, strict=True):
        torch.testing.assert_close(ours, theirs)
    # the last frames alone have not read what the dropped ones told them
    alone = claim.as_released(model, frames, words, whole)
    assert alone.token.tolist() == whole.token.tolist()
    assert not torch.allclose(alone.kv[-1][0], whole.kv[-1][0])


def test_a_change_of_the_prompt_reaches_the_cache_of_every_layer_but_the_first(model):
    g = torch.Generator().manual_seed(2)
    frames = torch.rand(1, 8, 4, 16, dtype=torch.float64, generator=g)
    old, new = (model.read(frames, torch.tensor([[digit, 10]])) for digit in (1, 2))
    same = [torch.equal(a[0], b[0]) for a, b in zip(old.kv, new.kv, strict=True)]
    assert same == [True, False, False]
