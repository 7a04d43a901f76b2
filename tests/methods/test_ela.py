"""ELA's own laws: maps of rank one, rows and columns treated alike, sizes of the variants, torch's own modules."""

import pytest
import torch

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("ela")
PATHS = (PAGE.reference, PAGE.fast)


def inputs(cfg, width=32, sides=(3, 5), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = {
            n: (p + 0.1 * torch.randn_like(p)).double() for n, p in PAGE.init(cfg, {"width": width}).items()
        }
        x = torch.rand(2, sides[0] * sides[1], width, dtype=torch.float64) + 0.5
    return x, Call("self", params=params, grid=sides)


def maps(path, x, cfg, call):
    """[B, C, rows, columns]"""
    return (path(x, cfg, call)[0] / x).mT.unflatten(2, call.sides)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", ["T", "B", "S", "L"])
def test_a_map_is_an_outer_product_between_zero_and_one(path, variant):
    cfg = PAGE.configure(variant=variant)
    found = maps(path, *inputs(cfg)[:1], cfg, inputs(cfg)[1])
    assert torch.linalg.svdvals(found)[..., 1].max() < 1e-12
    assert found.min() > 0 and found.max() < 1
    # and a map for each channel, of all rows and columns
    assert (found - found[:, :1]).abs().amax((0, 2, 3))[1:].min() > 1e-3
    assert found.std(2).min() > 0 and found.std(3).min() > 0


@pytest.mark.parametrize("path", PATHS)
def test_a_turned_image_gives_a_turned_output_where_rows_and_columns_share(path):
    for shared in (True, False):
        cfg = PAGE.configure(shared=shared)
        x, call = inputs(cfg)
        out = path(x, cfg, call)[0].unflatten(1, (3, 5))
        turned = path(x.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2), cfg, call.with_(grid=(5, 3)))[0]
        same = torch.allclose(turned.unflatten(1, (5, 3)).transpose(1, 2), out, atol=1e-12)
        assert same == shared


@pytest.mark.parametrize("path", PATHS)
def test_the_first_of_two_is_for_rows(path):
    """With the columns' part at zero and a norm without weight, only rows tell places apart."""
    cfg = PAGE.configure(shared=False, norm_groups=1)
    x, call = inputs(cfg)
    params = {**call.params, "norm": call.params["norm"].clone()}
    params["norm"][1] = 0
    found = maps(path, x, cfg, call.with_(params=params))
    assert found.std(3).max() < 1e-12 and found.std(2).min() > 1e-3


@pytest.mark.parametrize(
    ("variant", "width", "kernel", "together", "norms"),
    [("T", 64, 5, 1, 32), ("B", 64, 7, 1, 16), ("S", 64, 5, 8, 16), ("L", 64, 7, 8, 16), ("L", 4, 7, 4, 4)],
)
def test_the_sizes_of_the_variants(variant, width, kernel, together, norms):
    from regard.methods.blocks.ela import sizes

    cfg = PAGE.configure(variant=variant)
    assert PAGE.init(cfg, {"width": width})["conv"].shape == (1, width, together, kernel)
    assert sizes(cfg, width) == (kernel, width // together, norms)


def test_groups_part_the_channels():
    with pytest.raises(ValueError, match="norm_groups part the channels evenly"):
        PAGE.init(PAGE.configure(variant="T"), {"width": 48})
    with pytest.raises(ValueError, match="groups part the channels evenly"):
        PAGE.init(PAGE.configure(groups=5), {"width": 32})
    with pytest.raises(ValueError, match="the kernel is odd"):
        PAGE.configure(kernel=4)


@pytest.mark.parametrize("path", PATHS)
def test_convolution_and_norm_are_those_of_torch(path):
    cfg = PAGE.configure(variant="S", shared=False)
    x, call = inputs(cfg)
    image = x.mT.unflatten(2, (3, 5))
    profiles = []
    for which, z in enumerate((image.mean(3), image.mean(2))):
        conv = torch.nn.Conv1d(32, 32, 5, padding=2, groups=4, bias=False).double()
        norm = torch.nn.GroupNorm(16, 32).double()
        with torch.no_grad():
            conv.weight.copy_(call.params["conv"][which])
            norm.weight.copy_(call.params["norm"][which])
            norm.bias.copy_(call.params["norm_bias"][which])
            profiles.append(norm(conv(z)).sigmoid())
    wanted = image * profiles[0][..., None] * profiles[1][:, :, None]
    torch.testing.assert_close(path(x, cfg, call)[0], wanted.flatten(2).mT, rtol=1e-10, atol=1e-12)
