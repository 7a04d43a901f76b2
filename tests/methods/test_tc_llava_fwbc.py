"""Frame-wise block causal attention: a slow loop, padding, and a text without a video."""

import torch

from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.masks import tc_llava_fwbc as page
from regard.nn import Attention

# a word, two frames of three patches with a word between them, a ragged frame of two, two words
FRAME = [-1, 0, 0, 0, -1, 1, 1, 1, 2, 2, -1, -1]


def test_by_a_slow_loop_with_padding_in_one_row():
    rows = [FRAME, [-1, -1, *FRAME[:-2]]]
    dense = page.build(page.Config()).dense(len(FRAME), roles=Roles(frame=rows))
    for row, frame in enumerate(rows):
        for i, own in enumerate(frame):
            last = max([j for j, f in enumerate(frame) if f == own], default=i) if own >= 0 else i
            assert dense[row, 0, i].tolist() == [j <= max(i, last) for j in range(len(frame))], (row, i)


def test_a_text_without_frames_is_causal():
    dense = page.build(page.Config()).dense(5, roles=Roles(frame=[-1] * 5))
    assert torch.equal(dense, causal().dense(5))


def test_whole_frames_one_after_the_other_are_the_whole():
    """Nothing of a frame changes when later frames are not there yet: a prompt can be read frame by frame."""
    layer = Attention(16, 2, "softmax", "self", mask="tc_llava_fwbc").double()
    x = torch.randn(1, len(FRAME), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = layer(x, roles=Roles(frame=FRAME))[0]
    for end in (1, 4, 5, 8, 10, 11):
        part = layer(x[:, :end], roles=Roles(frame=FRAME[:end]))[0]
        torch.testing.assert_close(part, whole[:, :end], rtol=0, atol=1e-12)
