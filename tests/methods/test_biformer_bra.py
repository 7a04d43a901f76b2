"""What the battery leaves out: the released code's form, who reads whom, ties, and which precision chooses."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from regard import attend, catalog
from regard.core.call import Call
from regard.core.roles import Roles
from regard.ops import products_in

PAGE = catalog.get("biformer_bra")
PATHS = (PAGE.reference, PAGE.fast)
HEADS, KEY, VALUE = 2, 4, 3


def drawn(sides, seed=0, **settings):
    g, n = torch.Generator().manual_seed(seed), sides[0] * sides[1]
    cfg = PAGE.configure(**settings)
    q, k, v = (torch.randn(2, HEADS, n, d, generator=g, dtype=torch.float64) for d in (KEY, KEY, VALUE))
    shapes = PAGE.init(cfg, {"heads": HEADS, "kv_heads": HEADS, "key": KEY, "value": VALUE, "width": 8})
    params = {name: torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in shapes.items()}
    return q, k, v, cfg, Call("self", params=params, grid=sides)


def as_released(q, k, v, cfg, call):
    """The released module: maps of all channels, heads apart only after routing; means by average pooling."""
    high, wide = (side // cfg.regions for side in call.sides)
    maps = [t.transpose(1, 2).flatten(2).mT.unflatten(2, call.sides) for t in (q, k, v)]  # [B, C, y, x]
    q_r, k_r = (F.avg_pool2d(t, (high, wide)).flatten(2) for t in maps[:2])  # [B, C, S²]
    top = (q_r.mT @ k_r).topk(cfg.top_k, dim=-1).indices  # [B, S², k]

    def cut(t):
        t = t.unflatten(3, (cfg.regions, wide)).unflatten(2, (cfg.regions, high))  # [B, C, S, h, S, w]
        return t.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # [B, S², h·w, C]

    q_w, k_w, v_w = (cut(t) for t in maps)
    rows = torch.arange(len(q))[:, None, None]
    k_w, v_w = (t[rows, top].flatten(2, 3) for t in (k_w, v_w))  # [B, S², k·h·w, C]
    q_w, k_w, v_w = (t.unflatten(-1, (HEADS, -1)).transpose(2, 3) for t in (q_w, k_w, v_w))
    scale = (HEADS * KEY) ** -0.5 if cfg.scale is None else cfg.scale
    out = (scale * q_w @ k_w.mT).softmax(-1) @ v_w  # [B, S², H, h·w, E]
    out = out.transpose(2, 3).flatten(3).unflatten(2, (high, wide)).unflatten(1, 2 * (cfg.regions,))
    out = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, y, x]
    if cfg.lce:
        kernel, bias = (call.params[name].flatten(0, 1) for name in ("lce", "lce_bias"))
        out = out + F.conv2d(maps[2], kernel[:, None], bias, padding=cfg.lce // 2, groups=len(kernel))
    return out.flatten(2).unflatten(1, (HEADS, VALUE)).mT


@pytest.mark.parametrize("settings", [{"lce": 0}, {}, {"regions": 3, "top_k": 5, "lce": 3, "scale": 0.7}])
def test_it_is_the_released_module(settings):
    for sides in ((7, 14), (14, 7)) if settings.get("regions", 7) == 7 else ((6, 9), (12, 3)):
        asked = drawn(sides, **settings)
        wanted = as_released(*asked)
        for path in PATHS:
            assert_close(path(*asked)[0], wanted, rtol=1e-10, atol=1e-10)


def test_a_region_reads_those_that_it_chose_and_no_other():
    """Values move the outputs of the regions that chose theirs; a query moves outputs of its own region alone."""
    sides, s = (6, 9), 3
    q, k, v, cfg, call = drawn(sides, regions=s, top_k=2, lce=0)
    region = torch.arange(54).view(sides).unfold(0, 2, 2).unfold(1, 3, 3).reshape(9, 6)  # the places of each
    q_mean, k_mean = (t[0][:, region].mean(2).transpose(0, 1).flatten(1) for t in (q, k))
    chosen = (q_mean @ k_mean.T).topk(2).indices.tolist()
    assert len({tuple(sorted(row)) for row in chosen}) > 2
    for path in PATHS:
        base = path(q, k, v, cfg, call)[0]
        for r in range(9):
            other = v.clone()
            other[0, :, region[r, 2]] += 1
            moved = (
                ((path(q, k, other, cfg, call)[0] - base)[0].abs().amax((0, 2)) > 1e-9).nonzero().flatten()
            )
            readers = [i for i in range(9) if r in chosen[i]]
            assert moved.tolist() == sorted(region[readers].flatten().tolist())
            other = q.clone()
            other[0, :, region[r, 2]] += 3
            moved = (
                ((path(other, k, v, cfg, call)[0] - base)[0].abs().amax((0, 2)) > 1e-9).nonzero().flatten()
            )
            assert region[r, 2] in moved and {*moved.tolist()} <= {*region[r].tolist()}


def test_regions_that_change_places_change_the_places_of_their_outputs():
    sides = (6, 6)
    q, k, v, cfg, call = drawn(sides, regions=3, top_k=4, lce=0)
    region = torch.arange(36).view(sides).unfold(0, 2, 2).unfold(1, 2, 2).reshape(9, 4)
    order = torch.empty(36, dtype=torch.long)
    order[region.flatten()] = region[torch.randperm(9, generator=torch.Generator().manual_seed(0))].flatten()
    for path in PATHS:
        out = path(q, k, v, cfg, call)[0]
        other = path(*(t[:, :, order] for t in (q, k, v)), cfg, call)[0]
        assert_close(other, out[:, :, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_regions_that_tie_the_first_are_read(dtype):
    """An image of one colour: every region reads regions 0, 1, ..., k - 1, whose values are their numbers."""
    g = torch.Generator().manual_seed(0)
    for s, top_k in ((7, 4), (7, 48), (3, 2)):
        side = 2 * s
        number = torch.arange(s * s).view(s, s).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
        q, k = (torch.randn(1, 3, 1, 5, generator=g).expand(-1, -1, side**2, -1).to(dtype) for _ in range(2))
        v = number.to(dtype).view(1, 1, -1, 1).expand(1, 3, -1, 2)
        for path in PATHS:
            out = path(
                q, k, v, PAGE.configure(regions=s, top_k=top_k, lce=0), Call("self", grid=(side, side))
            )[0]
            assert_close(out.double(), torch.full_like(out, (top_k - 1) / 2).double(), rtol=1e-2, atol=0)


def test_means_are_taken_in_float32_at_least():
    """Two regions whose means bfloat16 does not tell apart: the second is a little nearer, and is read."""
    sides, step = (8, 16), 2**-7  # the step of bfloat16 above 1
    k = torch.ones(1, 1, 128, 1, dtype=torch.bfloat16)
    left = torch.arange(128) % 16 < 8
    region_1 = (~left).nonzero().flatten()
    k[:, :, region_1[:3]] += step  # three places of 64
    v = (~left).to(torch.bfloat16).view(1, 1, -1, 1)
    cfg = PAGE.configure(regions=2, top_k=1, lce=0)
    top = Call("self", grid=sides)
    for path in PATHS:
        for products in ("native", "float32"):
            with products_in(products):
                out = path(torch.ones_like(k), k, v, cfg, top)[0]
            assert bool((out == 1).all())


def test_what_does_not_fit_is_refused():
    tokens = torch.zeros(1, 1, 60, 4)
    params = {"lce": torch.zeros(1, 4, 5, 5), "lce_bias": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=r"regions divide the sides of the grid.*regions=7.*sides=\(6, 10\)"):
        attend(*3 * [tokens], "biformer_bra", "self", params=params, roles=Roles.grid(6, 10))
    for settings in (
        {"regions": 2, "top_k": 5},
        {"top_k": 0},
        {"lce": 2},
        {"lce": -1},
        {"regions": 0, "top_k": None},
    ):
        with pytest.raises(ValueError, match="must hold"):
            PAGE.configure(**settings)
