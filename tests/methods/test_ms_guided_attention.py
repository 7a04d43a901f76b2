"""Guided dual attention's own laws: loops over places and channels, the identity at first, what the losses teach."""

import math

import pytest
import torch

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.ms_guided_attention import guide, guided, reconstruction

PAGE = catalog.get("ms_guided_attention")
PATHS = (PAGE.reference, PAGE.fast)
ATTENTIONS = ("both", "position", "channel")


def inputs(attention, n=5, width=4, first=False):
    cfg = PAGE.configure(attention=attention, squeeze=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = PAGE.init(cfg, {"width": width})
        params = {
            name: (p if first else p + 0.7 * torch.randn_like(p)).double() for name, p in params.items()
        }
        return torch.randn(2, n, width, dtype=torch.float64), cfg, Call("self", params=params, grid=(1, n))


def softmax(row):
    powers = [math.exp(t) for t in row]
    return [p / sum(powers) for p in powers]


def dot(a, b):
    return sum(s * t for s, t in zip(a, b, strict=True))


def positions(pixels, p):
    q, k, v = (
        [[dot(row, pixel) + b for row, b in zip(p[n], p[n + "_bias"], strict=True)] for pixel in pixels]
        for n in ("q", "k", "v")
    )
    rows = [softmax([dot(a, b) for b in k]) for a in q]
    return [[dot(row, channel) for channel in zip(*v, strict=True)] for row in rows]


def channels(pixels):
    planes = list(zip(*pixels, strict=True))
    mixed = []
    for a in planes:
        energies = [dot(a, b) for b in planes]
        weights = softmax([max(energies) - e for e in energies])
        mixed.append([dot(weights, [plane[n] for plane in planes]) for n in range(len(pixels))])
    return list(zip(*mixed, strict=True))


def slow(pixels, p, attention):
    out = [list(pixel) for pixel in pixels]
    added = [] if attention == "channel" else [(p["position_gamma"][0], positions(pixels, p))]
    added += [] if attention == "position" else [(p["channel_gamma"][0], channels(pixels))]
    for gamma, terms in added:
        out = [[x + gamma * y for x, y in zip(a, b, strict=True)] for a, b in zip(out, terms, strict=True)]
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_it_is_the_loop(attention, path):
    x, cfg, call = inputs(attention)
    found = path(x, cfg, call)[0]
    wanted = [slow(image, {n: p.tolist() for n, p in call.params.items()}, attention) for image in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_it_begins_as_the_identity_that_learns(attention, path):
    """Exactly; gammas, one for each module, are what the first step moves."""
    x, cfg, call = inputs(attention, first=True)
    params = {name: p.requires_grad_() for name, p in call.params.items()}
    out = path(x, cfg, call.with_(params=params))[0]
    assert torch.equal(out, x)
    out.sin().sum().backward()
    moved = {name for name, p in params.items() if p.grad is not None and bool(p.grad.any())}
    both = {"position_gamma", "channel_gamma"}
    assert moved == {"both": both, "position": {"position_gamma"}, "channel": {"channel_gamma"}}[attention]


@pytest.mark.parametrize("path", PATHS)
def test_a_channel_mixes_in_what_is_unlike_it(path):
    """Two channels that are the same and one that is their negative: all of the first two's weight is on the third."""
    a = 3 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, call = (
        torch.stack([a, a, -a], dim=2),
        Call("self", params={"channel_gamma": torch.ones(1)}, grid=(4, 5)),
    )
    added = path(x, PAGE.configure(attention="channel"), call)[0] - x
    torch.testing.assert_close(added, torch.stack([-a, -a, a], dim=2))


def test_the_default_is_both_with_an_eighth_of_the_channels():
    params = PAGE.init(PAGE.config(), {"width": 16})
    assert {n: tuple(p.shape) for n, p in params.items() if p.dim() == 2} == {
        "q": (2, 16),
        "k": (2, 16),
        "v": (16, 16),
    }
    assert {"position_gamma", "channel_gamma"} < {*params}
    with pytest.raises(ValueError, match="multiple of squeeze"):
        PAGE.init(PAGE.config(), {"width": 12})


def test_the_loss_is_the_sum_of_its_terms_and_teaches_both_passes():
    g = torch.Generator().manual_seed(0)
    a, b, read, made = (
        torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)
    )
    squares = [((x - y) ** 2).mean() for x, y in ((a, b), (b, 2 * a), (read, made), (read, a))]
    entropies = [a.sum(), b.cos().sum(), read.sum()]
    codes, images = [(a, b), (b, 2 * a)], [(read, made), (read, a)]
    torch.testing.assert_close(guide(codes), squares[0] + squares[1])
    torch.testing.assert_close(reconstruction(images), squares[2] + squares[3])
    found = guided(entropies, codes, images)
    wanted = sum(entropies) + 0.25 * (squares[0] + squares[1]) + 0.1 * (squares[2] + squares[3])
    torch.testing.assert_close(found, wanted)
    leaves = (a, b, read, made)
    taught = [torch.autograd.grad(of, leaves, retain_graph=True) for of in (found, wanted)]
    torch.testing.assert_close(*taught)
    weighed = guided(entropies, codes, images, guide_weight=2.0, reconstruction_weight=3.0)
    torch.testing.assert_close(weighed, sum(entropies) + 2 * guide(codes) + 3 * reconstruction(images))
