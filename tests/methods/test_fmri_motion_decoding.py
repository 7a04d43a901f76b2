"""The parts of the simulated decoding: motion that is known is found in the frames, ridge and r by hand, no leaks."""

import torch

from regard.claims.findings import fmri_motion_decoding as claim


def test_the_second_frame_is_the_first_one_moved():
    """A shift by a whole pixel, to the right, and a turn by a quarter."""
    g = torch.Generator().manual_seed(0)
    shift = torch.zeros(3, 6)
    shift[:, 4] = 1
    first, second = claim.frames(g, shift)
    torch.testing.assert_close(second[:, :, 1:], first[:, :, :-1], atol=1e-4, rtol=0)
    # x - (A x) is (-y, x) in the frame where A x = (x + y, y - x), A's numbers being those of the edge
    turn = claim.SIDE / 2 * torch.tensor([[1.0, 1.0, -1.0, 1.0, 0, 0]])
    first, second = claim.frames(g, turn)
    torch.testing.assert_close(second[0], first[0].T.flip(0), atol=1e-3, rtol=0)


def test_flow_is_the_motion_in_the_middle_of_each_window():
    g = torch.Generator().manual_seed(1)
    motion = torch.randn(40, 6, generator=g) / 4
    wanted = claim.displaced(claim.grid(4).expand(40, -1, -1), motion).flatten(1)
    found = claim.flow_of(*claim.frames(g, motion))
    assert (found - wanted).abs().mean() < 0.04 < 0.2 < wanted.abs().mean()
    right = torch.zeros(1, 6)
    right[0, 4] = 0.5
    by_axis = claim.flow_of(*claim.frames(g, right)).view(16, 2).mean(0)
    torch.testing.assert_close(by_axis, torch.tensor([0.5, 0.0]), atol=0.03, rtol=0)


def test_windows_stand_row_by_row():
    image = torch.arange(32 * 32).view(1, 32, 32)
    parts = claim.windows(image)
    assert parts.shape == (1, 16, 64)
    assert torch.equal(parts[0, 6].view(8, 8), image[0, 8:16, 16:24])


def test_ridge_and_correlation_by_hand():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [1.0]])
    torch.testing.assert_close(claim.ridge(x, y, 3.0), torch.tensor([[0.5]]))  # 4 / (5 + 3)
    a = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    b = torch.tensor([[7.0, 3.0], [5.0, 5.0], [3.0, 4.0]])
    torch.testing.assert_close(claim.correlation(a, b), torch.tensor([-1.0, 0.5]))


def test_nothing_of_the_test_clips_is_fitted():
    """Their values may be anything: the weights, their scale and λ stay, and r is that of the new values."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(claim.CLIPS, 5, generator=g)
    y = x @ torch.randn(5, 3, generator=g) + torch.randn(claim.CLIPS, 3, generator=g)
    first = claim.predicted(x, y)
    turned = torch.cat([y[: claim.TRAINED], -7 * y[claim.TRAINED :] + 100])
    torch.testing.assert_close(claim.predicted(x, turned), -first)
    assert first.min() > 0.5


def test_a_shuffle_keeps_the_test_clips_and_moves_the_others():
    x = torch.arange(claim.CLIPS)
    moved = claim.shuffled(x, torch.Generator().manual_seed(3))
    n = claim.TRAINED
    assert torch.equal(moved[n:], x[n:]) and torch.equal(moved[:n].sort().values, x[:n])
    assert (moved[:n] != x[:n]).float().mean() > 0.9


def test_voxels_are_made_of_what_they_are_said_to_be():
    at = claim.clips(5)
    static, moving = claim.voxels(at, 5)
    assert static.shape == moving.shape == (claim.CLIPS, claim.VOXELS)

    def explained(features, voxels):
        """The share of variance that least squares explains."""
        x = torch.cat([features, torch.ones(len(features), 1)], 1)
        rest = voxels - x @ torch.linalg.lstsq(x, voxels).solution
        return (1 - rest.var(0) / voxels.var(0)).mean().item()

    by = {
        (name, kind): explained(features, voxels)
        for name, features in (("static", at.static), ("motion", at.motion))
        for kind, voxels in (("static", static), ("moving", moving))
    }
    assert abs(by["static", "static"] - 1 / 2) < 0.05 and by["motion", "static"] < 0.05
    assert abs(by["static", "moving"] - 1 / 3) < 0.05 and abs(by["motion", "moving"] - 1 / 3) < 0.05
