"""A noised picture keeps a variance of one, and differs from the picture by more the later the step."""

import pytest
import torch

from regard.methods.steering import vcd as page


def test_noise_takes_the_place_of_the_picture():
    g = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 3, 40, 40, generator=g), torch.randn(2, 3, 40, 40, generator=g)
    shares = []
    for step in (0, 500, 999):
        found = page.noised(picture, noise, step)
        assert abs(found.var() - 1) < 0.05
        shares.append(float((found * picture).mean() / picture.var()))
    assert shares == sorted(shares, reverse=True) and abs(shares[1] - page.kept_share(500) ** 0.5) < 0.05


def test_the_stream_draws_from_its_generator():
    (stream,) = page.streams(page.Config())
    given = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    one, two = (stream.pixels(given, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.dtype == given.dtype and torch.equal(one, two) and one.any()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="0 <= noise < 1000"):
        page.Config(noise=1000)
    with pytest.raises(ValueError, match="0 <= cut <= 1"):
        page.Config(cut=2.0)
    assert page.streams(page.Config(strength=0.0)) == ()
