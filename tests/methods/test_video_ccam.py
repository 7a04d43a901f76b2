"""The causal cross-attention mask: rounding at the borders in exact fractions, batches of videos, order."""

from fractions import Fraction

import pytest
import torch

import regard
from regard.methods.masks import video_ccam as page


def seen(queries, frames, patches=1):
    roles = page.video_roles(queries, frames, patches)
    return page.build(page.Config()).dense(queries, roles[1].length, roles=roles)


@pytest.mark.parametrize("queries", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16, 96])
def test_a_frame_is_seen_once_it_has_begun(queries, frames):
    dense = seen(queries, frames, patches=2)[0, 0]
    for n in range(queries):
        for t in range(frames):
            begun = Fraction(t, frames) < Fraction(n + 1, queries)
            assert dense[n, 2 * t].item() == dense[n, 2 * t + 1].item() == begun, (n, t)
    assert dense[:, 0].all(), "every query sees the first frame"
    assert dense[-1].all(), "the last query sees all"
    assert int((dense[1:] < dense[:-1]).sum()) == 0, "a later query sees no less"


def test_one_frame_is_unmasked():
    assert seen(8, 1, patches=5).all()


def test_videos_of_a_batch_are_each_as_if_alone():
    """Frames after a video's own are padding: no query of it sees them."""
    dense = seen(12, [3, 16, 1], patches=2)
    for row, frames in enumerate((3, 16, 1)):
        assert torch.equal(dense[row, 0, :, : 2 * frames], seen(12, frames, patches=2)[0, 0])
        assert not dense[row, 0, :, 2 * frames :].any()


def test_attend_in_cross_with_a_pair_of_roles():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=g, dtype=torch.float64) for n in (6, 12, 12))
    roles = page.video_roles(6, [4, 2], patches=3)
    out = regard.attend(q, k, v, "softmax", "cross", mask="video_ccam", roles=roles).out
    for row, frames in enumerate((4, 2)):
        for n in range(6):
            m = 3 * -(-(n + 1) * frames // 6)  # patches of ⌈n T / N⌉ frames
            alone = regard.attend(q[row : row + 1, :, n : n + 1], k[row : row + 1, :, :m], v[row : row + 1, :, :m],
                                  "softmax", "cross").out  # fmt: skip
            torch.testing.assert_close(out[row : row + 1, :, n : n + 1], alone)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match="queries, frames, patches >= 1"):
        page.video_roles(4, 0)
