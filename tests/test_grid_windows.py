"""Windows of an image with zeros around it are those of torch's unfold, at every border and dilation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from regard import catalog
from regard.ops.grid import inside, padded, window_attention, window_scores, window_sums
from regard.testing.case import Case
from regard.testing.laws import check_crop

IMAGES = ((5, 7), (1, 4), (6, 3), (8, 9))
WINDOWS = ((1, 1), (3, 1), (3, 2), (5, 1), (5, 3), (7, 2))


def unfolded(x, sides, window, dilation):
    """[B, H, w², N, C] of tokens [B, H, N, C], all of it gathered."""
    images = x.mT.reshape(-1, x.shape[-1], *sides)
    found = F.unfold(images, window, dilation=dilation, padding=dilation * (window // 2))
    return found.view(*x.shape[:2], x.shape[-1], window**2, -1).permute(0, 1, 3, 4, 2)


def drawn(sides, heads=4, groups=2):
    g = torch.Generator().manual_seed(0)
    n = sides[0] * sides[1]
    shapes = (heads, 3), (groups, 3), (groups, 5)
    return [torch.randn(2, h, n, d, generator=g, dtype=torch.float64).requires_grad_() for h, d in shapes]


@pytest.mark.parametrize(("window", "dilation"), WINDOWS)
@pytest.mark.parametrize("sides", IMAGES)
def test_windows_are_those_of_unfold(sides, window, dilation):
    q, k, v = drawn(sides)
    keys, values = (unfolded(t.repeat_interleave(2, 1), sides, window, dilation) for t in (k, v))
    wanted = (q[:, :, None] * keys).sum(-1)
    found = window_scores(q, k, sides, window, dilation)
    torch.testing.assert_close(found, wanted)
    ones = unfolded(torch.ones(1, 1, len(q[0, 0]), 1), sides, window, dilation)
    assert torch.equal(inside(sides, window, dilation), ones[0, 0, ..., 0] == 1)
    total = window_sums(wanted, v, sides, window, dilation)
    torch.testing.assert_close(total, (wanted[..., None] * values).sum(2))


@pytest.mark.parametrize("wide", [1, 99])
@pytest.mark.parametrize(("window", "dilation"), WINDOWS)
@pytest.mark.parametrize("sides", IMAGES)
def test_a_softmax_over_windows_counts_the_padding(sides, window, dilation, wide, monkeypatch):
    """In tiles and without them, outputs and gradients, with grouped heads."""
    monkeypatch.setattr(padded, "WIDE", wide)
    inputs = drawn(sides)
    q, k, v = inputs
    keys, values = (unfolded(t.repeat_interleave(2, 1), sides, window, dilation) for t in (k, v))
    weights = (0.7 * (q[:, :, None] * keys).sum(-1)).softmax(2)
    wanted = (weights[..., None] * values).sum(2)
    found = window_attention(q, k, v, sides, window, dilation, 0.7)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        *(torch.autograd.grad(t.cos().sum(), inputs) for t in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_low_precision_is_multiplied_and_summed_in_float32():
    """300² leaves float16, and nine values of 300 pass 2,048, from where on it counts in steps of two."""
    x = torch.full((1, 1, 9, 1), 300.1).half()
    exact = x[0, 0, 0].double().item()
    scores = window_scores(x, x, (3, 3), 3)
    out = window_sums(torch.ones(1, 1, 9, 9), x, (3, 3), 3)
    assert scores.dtype == out.dtype == torch.float32
    assert scores[0, 0, 4, 4].item() == pytest.approx(exact**2)
    assert out[0, 0, 4].item() == pytest.approx(9 * exact)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"window": 5}])
def test_msa_conv_reads_as_far_as_it_says_and_no_less_far(options):
    page = catalog.get("tic_msa_conv")
    cfg = page.configure(**options)
    check_crop(Case(page, cfg, "self"))
    reach = page.grid.local(cfg)[0]
    nearer = replace(page, grid=replace(page.grid, local=lambda cfg: (reach - 1, 1)))
    with pytest.raises(AssertionError, match="inside a crop"):
        check_crop(Case(nearer, cfg, "self"))
