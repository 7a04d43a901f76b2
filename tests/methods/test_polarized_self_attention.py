"""Polarized self-attention's own laws: a loop over pixels and channels, the two layouts, what a softmax stands on."""

import math

import pytest
import torch

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("polarized_self_attention")
PATHS = (PAGE.reference, PAGE.fast)
LAYOUTS = ("parallel", "sequential")


def inputs(n=6, width=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = PAGE.init(PAGE.config(), {"width": width})
        params = {name: (p + 0.3 * torch.randn_like(p)).double() for name, p in params.items()}
        return torch.randn(2, n, width, dtype=torch.float64), Call("self", params=params, grid=(n,))


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def softmax(row):
    powers = [math.exp(t) for t in row]
    return [p / sum(powers) for p in powers]


def dot(a, b):
    return sum(s * t for s, t in zip(a, b, strict=True))


def channel_weights(pixels, p, eps=1e-5):
    weights = softmax([dot(p["q"][0], pixel) for pixel in pixels])
    folded = [dot(weights, [dot(row, pixel) for pixel in pixels]) for row in p["v"]]
    z = [dot(row, folded) for row in p["up"]]
    mean = sum(z) / len(z)
    spread = (sum((t - mean) ** 2 for t in z) / len(z) + eps) ** 0.5
    return [
        sigmoid((t - mean) / spread * w + b) for t, w, b in zip(z, p["norm"], p["norm_bias"], strict=True)
    ]


def pixel_weights(pixels, p):
    q = softmax([sum(dot(row, pixel) for pixel in pixels) / len(pixels) for row in p["pixel_q"]])
    return [sigmoid(dot(q, [dot(row, pixel) for row in p["pixel_v"]])) for pixel in pixels]


def slow(pixels, p, layout):
    """Plain lists of one image: pixels by channels."""
    by_channel = channel_weights(pixels, p)
    weighed = [[x * a for x, a in zip(pixel, by_channel, strict=True)] for pixel in pixels]
    if layout == "sequential":
        return [[x * a for x in pixel] for pixel, a in zip(weighed, pixel_weights(weighed, p), strict=True)]
    by_pixel = pixel_weights(pixels, p)
    return [
        [x * a + y for x, y in zip(pixel, other, strict=True)]
        for pixel, other, a in zip(pixels, weighed, by_pixel, strict=True)
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_loop(layout, path):
    x, call = inputs()
    found = path(x, PAGE.configure(layout=layout), call)[0]
    wanted = [slow(image, {n: p.tolist() for n, p in call.params.items()}, layout) for image in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_zero_weigh_all_alike(path):
    x, call = inputs()
    call = call.with_(params={name: torch.zeros_like(p) for name, p in call.params.items()})
    for layout, share in zip(LAYOUTS, (1.0, 0.25), strict=True):
        torch.testing.assert_close(path(x, PAGE.configure(layout=layout), call)[0], share * x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmaxes_do_not_see_what_is_the_same_everywhere(layout, path):
    """More of the same to all pixels' scores, or to all C/2, changes nothing; a softmax over others would see it."""
    x, call = inputs()
    x = x.clone()
    x[..., 0] = 1.0  # a channel that is a bias
    cfg, changed = PAGE.configure(layout=layout), {n: p.clone() for n, p in call.params.items()}
    changed["q"][:, 0] += 2.0
    out = path(x, cfg, call)[0]
    torch.testing.assert_close(path(x, cfg, call.with_(params=changed))[0], out)
    changed["pixel_q"][:, 0] += 2.0
    torch.testing.assert_close(path(x, cfg, call.with_(params=changed))[0], out)
    changed["pixel_q"][0, 0] += 2.0
    assert (path(x, cfg, call.with_(params=changed))[0] - out).abs().max() > 1e-3


def test_the_width_is_even():
    with pytest.raises(ValueError, match="the width is even"):
        PAGE.init(PAGE.config(), {"width": 5})
