"""ConnNet's own laws: the block by loops, connectivities place by place, the round trip, agreement of both ends."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.connnet import connectivity, decoded, logits, loss

PAGE = catalog.get("connnet")
PATHS = (PAGE.reference, PAGE.fast)
DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def inputs(first=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = PAGE.init(PAGE.config(), {"width": 6})
        params = {
            name: (p if first else p + 0.5 * torch.randn_like(p)).double() for name, p in params.items()
        }
        return torch.randn(2, 5, 6, dtype=torch.float64), Call("self", params=params, grid=(1, 5))


def dot(a, b):
    return sum(s * t for s, t in zip(a, b, strict=True))


def slow(pixels, p):
    theta, phi, g = (
        [[dot(row, pixel) + b for row, b in zip(p[n], p[n + "_bias"], strict=True)] for pixel in pixels]
        for n in ("theta", "phi", "g")
    )
    out = []
    for pixel, asked in zip(pixels, theta, strict=True):
        powers = [math.exp(dot(asked, key)) for key in phi]
        mixed = [dot(powers, channel) / sum(powers) for channel in zip(*g, strict=True)]
        added = [dot(row, mixed) + b for row, b in zip(p["out"], p["out_bias"], strict=True)]
        out.append([x + y for x, y in zip(pixel, added, strict=True)])
    return out


def random_masks(count=40):
    g = torch.Generator().manual_seed(0)
    return (torch.rand(count, 5, 6, generator=g) < torch.linspace(0.05, 0.95, count)[:, None, None]).float()


def near(y, x, rows, columns):
    """(direction, row, column) of the neighbours that there are."""
    places = [(d, y + dy, x + dx) for d, (dy, dx) in enumerate(DIRECTIONS)]
    return [(d, a, b) for d, a, b in places if 0 <= a < rows and 0 <= b < columns]


@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_loop(path):
    x, call = inputs()
    wanted = [slow(image, {n: p.tolist() for n, p in call.params.items()}) for image in x.tolist()]
    found = path(x, PAGE.config(), call)[0]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_it_begins_as_the_identity_that_learns(path):
    x, call = inputs(first=True)
    params = {name: p.requires_grad_() for name, p in call.params.items()}
    out = path(x, PAGE.config(), call.with_(params=params))[0]
    assert torch.equal(out, x)
    out.sin().sum().backward()
    assert bool(params["out"].grad.any()) and bool(params["out_bias"].grad.any())


def test_half_of_the_channels_are_compared():
    params = PAGE.init(PAGE.config(), {"width": 6})
    assert {n: tuple(p.shape) for n, p in params.items() if p.dim() == 2} == {
        "theta": (3, 6), "phi": (3, 6), "g": (3, 6), "out": (6, 3)
    }  # fmt: skip
    with pytest.raises(ValueError, match="multiple of squeeze"):
        PAGE.init(PAGE.config(), {"width": 5})


def test_connectivity_is_the_loop():
    masks = random_masks()
    wanted = torch.zeros(len(masks), 8, 5, 6)
    for mask, maps in zip(masks, wanted, strict=True):
        for y in range(5):
            for x in range(6):
                for d, a, b in near(y, x, 5, 6):
                    maps[d, y, x] = mask[y, x] * mask[a, b]
    assert torch.equal(connectivity(masks), wanted)


def test_all_but_isolated_pixels_come_back():
    masks = random_masks()
    padded = F.pad(masks, (1, 1, 1, 1))
    around = sum(padded[:, 1 + dy : 6 + dy, 1 + dx : 7 + dx] for dy, dx in DIRECTIONS)
    kept = (masks > 0) & (around > 0)
    assert bool((kept != (masks > 0)).any())  # some pixels are isolated
    assert torch.equal(decoded(connectivity(masks)), kept)


def test_decoding_is_the_loop_and_asks_both_ends():
    """Of random connectivities, at two bars, one of which values meet exactly."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randint(9, (20, 8, 3, 4), generator=g) / 8 * (torch.rand(20, 8, 3, 4, generator=g) < 0.6)
    for above in (0.5, 0.75):
        wanted = torch.zeros(20, 3, 4, dtype=torch.bool)
        for image, connected in zip(wanted, maps.tolist(), strict=True):
            for y in range(3):
                for x in range(4):
                    for d, a, b in near(y, x, 3, 4):
                        back = DIRECTIONS.index((y - a, x - b))
                        image[y, x] |= connected[d][y][x] >= above and connected[back][a][b] >= above
        assert 0.05 < wanted.float().mean() < 0.95
        assert torch.equal(decoded(maps, above), wanted)
    assert torch.equal(decoded(maps), decoded(maps, 0.5))


def test_one_end_alone_makes_no_pixel():
    maps = torch.zeros(1, 8, 1, 3)
    maps[0, 4, 0, 0] = 1.0  # the first says: with the one to the right
    assert not decoded(maps).any()
    maps[0, 3, 0, 1] = 1.0  # and that one agrees
    assert decoded(maps).int().flatten().tolist() == [1, 1, 0]


def test_the_head_and_its_loss():
    g = torch.Generator().manual_seed(0)
    y, weight = torch.randn(2, 6, 3, generator=g), torch.randn(8, 3, generator=g)
    bias, masks = torch.randn(8, generator=g), random_masks(2)[:, :2, :3]
    found = logits(y, weight, bias, (2, 3))
    wanted = torch.einsum("bnc,dc->bdn", y, weight) + bias[:, None]
    torch.testing.assert_close(found, wanted.view(2, 8, 2, 3))
    p, c = found.sigmoid(), connectivity(masks)
    torch.testing.assert_close(loss(found, masks), -(c * p.log() + (1 - c) * (1 - p).log()).mean())
