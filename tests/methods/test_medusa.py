"""MEDUSA's own laws: one map for stages of other sizes, a body that sees the whole image, a map for all channels."""

import pytest
import torch
from torch.nn import functional as F

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks import medusa

PAGE = catalog.get("medusa")
PATHS = (PAGE.reference, PAGE.fast)


def inputs(sides=(5, 6), width=4, **settings):
    cfg = PAGE.configure(channels=5, hidden=3, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = {
            n: (p + 0.1 * torch.randn_like(p)).double() for n, p in PAGE.init(cfg, {"width": width}).items()
        }
        x = torch.rand(2, sides[0] * sides[1], width, dtype=torch.float64) + 0.5
    return x, cfg, Call("self", params=params, grid=sides)


@pytest.mark.parametrize("path", PATHS)
def test_one_map_between_zero_and_one_weighs_all_channels(path):
    x, cfg, call = inputs()
    found = path(x, cfg, call)[0] / x
    assert found.min() > 0 and found.max() < 1 and found.std(1).min() > 1e-4
    torch.testing.assert_close(found, found[..., :1].expand_as(found), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", [(1, 1), (3, 7), (10, 12)])
@pytest.mark.parametrize("maps", [1, 2])
def test_a_map_of_other_sides_is_resized_to_those_of_the_stage(sides, maps):
    """The head of a stage by torch's own modules."""
    _, _, call = inputs(maps=maps)
    g = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, maps, 5, 6, generator=g, dtype=torch.float64)
    stage = torch.randn(2, 4, *sides, generator=g, dtype=torch.float64)
    p = call.params
    large = F.interpolate(drawn, sides, mode="bilinear")
    middle = F.conv2d(torch.cat([large, stage], 1), p["read"], p["read_bias"], padding=1).relu()
    wanted = stage * torch.sigmoid(F.conv2d(middle, p["weigh"][..., None, None], p["weigh_bias"]))
    torch.testing.assert_close(medusa.rescaled(stage, drawn, p), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(medusa.slow_rescaled(stage, drawn, p), wanted, rtol=1e-10, atol=1e-12)


def test_the_page_is_its_body_and_its_head():
    x, cfg, call = inputs()
    image = x.mT.unflatten(2, call.sides)
    drawn = medusa.body(image, call.params)
    assert drawn.shape == (2, 1, 5, 6)
    wanted = medusa.rescaled(image, drawn, call.params).flatten(2).mT
    for path in PATHS:
        torch.testing.assert_close(path(x, cfg, call)[0], wanted, rtol=1e-10, atol=1e-12)


def test_a_stage_is_told_of_places_that_it_does_not_see():
    """A far pixel of the image moves the weights of a stage whose own features are the same."""
    _, _, call = inputs(sides=(16, 16))
    image = torch.rand(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = image.clone()
    other[..., 15, 15] += 5
    stage = image[..., :4, :4]
    near, far = (medusa.rescaled(stage, medusa.body(t, call.params), call.params) for t in (image, other))
    assert (near - far)[..., 0, 0].abs().max() > 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_every_level_of_the_body_counts(path):
    x, cfg, call = inputs()
    out = path(x, cfg, call)[0]
    for name in ("down", "up"):
        for level in range(cfg.levels):
            params = {**call.params, name: call.params[name].clone()}
            params[name][level] = 0
            assert (path(x, cfg, call.with_(params=params))[0] - out).abs().max() > 1e-6, (name, level)


def test_init_of_body_and_heads_by_themselves():
    cfg = PAGE.configure(maps=2)
    alone = {**medusa.init_body(cfg, 3), **medusa.init_head(cfg, 7)}
    assert {*alone} == {*PAGE.init(cfg, {"width": 3})}
    assert alone["enter"].shape == (16, 3, 3, 3) and alone["read"].shape == (8, 9, 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        PAGE.configure(levels=0)
