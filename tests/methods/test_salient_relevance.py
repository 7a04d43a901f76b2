"""Salient Relevance: what relevance sums to, what it is equal to, and where areas lie."""

import pytest
import torch
from torch import nn

from regard.core import Unsupported
from regard.methods.tracing import salient_relevance as page


def cnn(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias),
    ).double()  # fmt: skip


IMAGES = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("linear", ["positive", "all"])
def test_without_biases_relevance_is_the_logit(linear):
    net = cnn(False)
    classes = net(IMAGES).argmax(1)
    r = page.relevance(net, IMAGES, classes, linear == "positive")
    logits = net(IMAGES).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(r.sum((1, 2, 3)), logits, rtol=1e-5, atol=1e-7)


def test_with_all_weights_it_is_the_gradient_times_the_input():
    net, classes = cnn(False), torch.tensor([2, 1, 0, 0])
    x = IMAGES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).gather(1, classes[:, None]).sum(), x)
    r = page.relevance(net, IMAGES, classes, positive=False, eps=0.0)
    torch.testing.assert_close(r, IMAGES * slope.detach(), rtol=1e-9, atol=1e-12)


def test_biases_keep_relevance_for_themselves_and_units_are_asked_apart():
    net = cnn(True)
    r = page.relevance(net, IMAGES[:1], torch.tensor([0]))
    assert abs(r.sum() - net(IMAGES[:1])[0, 0]) > 1e-3
    with pytest.raises(Unsupported, match="through Sigmoid"):
        page.relevance(nn.Sequential(nn.Flatten(), nn.Sigmoid()), IMAGES, torch.zeros(4).long())


def test_areas_lie_around_the_relevance_and_take_no_sign_of_it():
    r = torch.zeros(1, 12, 12, dtype=torch.float64)
    r[0, 2:4, 2:4], r[0, 9, 9] = 1.0, -1.0
    areas = page.areas(r, page.Config(patch=3))[0]
    assert areas[2:4, 2:4].mean() > 4 * areas[8:11, 8:11].mean()
    assert areas[1, 1] > areas[6, 6]  # beside it rather than far
    signed = page.areas(r, page.Config(patch=3, signed=True))[0]
    assert signed[9, 9] > areas[9, 9]
    assert bool((page.areas(0 * r, page.Config()) == 0).all())
