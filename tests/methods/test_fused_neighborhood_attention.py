"""Neighbourhood attention against NATTEN's own rule, on lines, images and clips; and grids that are none.

The rule is that of NATTEN 0.21.7 (csrc/include/natten/cuda/reference/mask.hpp): indices are divided by the dilation,
the leader of a group of `stride` queries has a window to its left and right, and a term of its own moves it inwards at
the end of an axis. The page was compared with that package itself on 494 random settings: 9.5e-7 in float32 at most.
"""

import math
import random

import pytest
import torch

from regard import attend
from regard.core import Unsupported
from regard.core.call import Call
from regard.core.roles import Roles
from regard.methods.mechanisms.grid import fused_neighborhood_attention as page
from regard.testing.constants import small_constants

NAME = "fused_neighborhood_attention"
AXES = ("window", "dilation", "stride", "causal")


def bounds(index, length, window, stride, causal):
    """get_win_start and get_win_end: the first place of a window and that after the last."""
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(index // stride * stride + stride - 1, length - 1)
        return max(leader - left - right, 0), min(index + 1, length)
    leader = min(index // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return start, start + window


def reads(i, j, side, window, dilation, stride, causal):
    """Whether place i of an axis reads place j."""
    if i % dilation != j % dilation:
        return False
    length = (side - i % dilation + dilation - 1) // dilation
    start, end = bounds(i // dilation, length, window, stride, causal)
    return start <= j // dilation < end


def rule(sides, settings):
    """[N, N] bool, place by place."""
    count = math.prod(sides)
    seen = torch.zeros(count, count, dtype=torch.bool)
    axes = [[settings[name][a] for name in AXES] for a in range(len(sides))]
    lines = [
        [[reads(i, j, side, *axis) for j in range(side)] for i in range(side)]
        for side, axis in zip(sides, axes, strict=True)
    ]
    for i in range(count):
        for j in range(count):
            seen[i, j] = all(
                line[a][b] for line, a, b in zip(lines, *(at(n, sides) for n in (i, j)), strict=True)
            )
    return seen


def at(number, sides):
    """The places on each axis of a token's number."""
    found = []
    for side in reversed(sides):
        number, place = divmod(number, side)
        found.append(place)
    return found[::-1]


def drawn(axes, seed):
    """Sides, and settings that NATTEN takes with them: window times dilation fits, the stride is no longer."""
    pick = random.Random(1000 * axes + seed)
    sides = tuple(pick.randint(2, {1: 30, 2: 9, 3: 6}[axes]) for _ in range(axes))
    window = tuple(pick.randint(1, side) for side in sides)
    dilation = tuple(pick.randint(1, side // w) if w > 1 else 1 for side, w in zip(sides, window))
    stride = tuple(pick.randint(1, w) for w in window)
    causal = tuple(pick.random() < 0.3 for _ in sides)
    return sides, dict(zip(AXES, (window, dilation, stride, causal), strict=True))


def qkv(sides, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, math.prod(sides), 3), (1, 1, math.prod(sides), 3), (1, 1, math.prod(sides), 2))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def masked(q, k, v, seen):
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return s.softmax(-1) @ v


@pytest.mark.parametrize(("axes", "count"), [(1, 60), (2, 30), (3, 20)])
def test_is_nattens_rule(axes, count):
    """In tiles of the usual size and in small ones, so that every axis has some."""
    met = set()
    for seed in range(count):
        sides, settings = drawn(axes, seed)
        cfg, call, tokens = page.Config(**settings), Call("self", grid=sides), qkv(sides, seed)
        wanted = masked(*tokens, rule(sides, settings))
        with small_constants():
            small = page.METHOD.fast(*tokens, cfg, call)[0]
        for out in (page.reference(*tokens, cfg, call)[0], page.METHOD.fast(*tokens, cfg, call)[0], small):
            torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        met |= {(name, value > 1) for name in AXES[:3] for value in settings[name]}
        met |= {("causal", flag) for flag in settings["causal"]}
    assert len(met) == 8, "each setting is met at 1 and above"


def test_a_line_longer_than_a_tile():
    sides, settings = (150,), {"window": (9,), "dilation": (2,), "stride": (4,), "causal": (False,)}
    tokens, call = qkv(sides), Call("self", grid=sides)
    out = page.METHOD.fast(*tokens, page.Config(**settings), call)[0]
    torch.testing.assert_close(out, masked(*tokens, rule(sides, settings)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sides", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("more", [{}, {"stride": 3}, {"causal": True}])
def test_a_window_longer_than_its_axis_is_the_axis(sides, more):
    """Where NATTEN refuses it: as one of the axis's own length."""
    tokens = qkv(sides)
    place = torch.tensor([at(n, sides) for n in range(math.prod(sides))])
    seen = (place[None] <= place[:, None]).all(-1) if more.get("causal") else torch.ones(()).bool()
    for path in (page.reference, page.METHOD.fast):
        out = path(*tokens, page.Config(window=99, **more), Call("self", grid=sides))[0]
        torch.testing.assert_close(out, masked(*tokens, seen), rtol=1e-10, atol=1e-10)


def test_each_axis_has_its_own_settings_in_the_order_of_the_sides():
    """Window 1 on y reads the own row alone, window 1 on x the own column."""
    tokens = torch.zeros(1, 1, 12, 1), torch.zeros(1, 1, 12, 1), torch.arange(12.0).view(1, 1, 12, 1)
    for window, dim in (((1, 4), 1), ((3, 1), 0)):
        wanted = torch.arange(12.0).view(3, 4).mean(dim, keepdim=True).expand(3, 4)
        for path in (page.reference, page.METHOD.fast):
            out = path(*tokens, page.Config(window=window), Call("self", grid=(3, 4)))[0]
            torch.testing.assert_close(out.view(3, 4), wanted)


def asked(sides=(4, 4), roles=None, pattern="self", **settings):
    tokens = qkv(sides)
    return attend(*tokens, NAME, pattern, roles=Roles.grid(*sides) if roles is None else roles, **settings)


BAD_SETTINGS = (
    ({"window": 0}, "window >= 1"),
    ({"window": (3, 0)}, "window >= 1"),
    ({"window": -1}, "window >= 1"),
    ({"dilation": 0}, "dilation >= 1"),
    ({"stride": 0}, "stride"),
    ({"window": 3, "stride": 4}, "1 <= stride <= window"),
    ({"window": (3, 3), "dilation": (1, 1, 1)}, "a number for every axis, or one for each"),
)


@pytest.mark.parametrize(("settings", "says"), BAD_SETTINGS)
def test_settings_that_have_no_meaning_are_refused_when_they_are_made(settings, says):
    with pytest.raises(ValueError, match=says):
        page.Config(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": (3, 3, 3)}, "a number for every axis, or one for each.*axes=2"),
        ({"causal": (True,)}, "a number for every axis, or one for each.*axes=2"),
        ({"window": 3, "dilation": 3}, "a dilation leaves every place a neighbour.*dilation=3.*side=4"),
        ({"window": (1, 3), "dilation": (1, 3)}, "a dilation leaves every place a neighbour"),
    ],
)
def test_settings_that_do_not_go_with_the_grid_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        asked(**settings)


def test_a_dilation_that_leaves_each_place_one_neighbour_is_taken():
    settings = {"window": (2, 2), "dilation": (2, 2), "stride": (1, 1), "causal": (False, False)}
    out = asked(**settings).out
    torch.testing.assert_close(out, masked(*qkv((4, 4)), rule((4, 4), settings)), rtol=1e-10, atol=1e-10)
    # one that reads itself alone on an axis has none to miss
    assert torch.equal(asked(window=1, dilation=3).out, qkv((4, 4))[2].expand(-1, 2, -1, -1))


Y, X = (Roles.grid(4, 4)[name] for name in "yx")
BAD_GRIDS = (
    (Roles.grid(3, 5), "a grid has a place for each token.*tokens=16"),
    (Roles.grid(17), "a grid has a place for each token.*tokens=16"),
    (Roles(y=Y), "tokens of a grid say where they stand"),
    (Roles(document=Y), "tokens of a grid say where they stand"),
    (Roles(y=Y + (Y >= 2), x=X), "each place once"),  # without row 2
    (Roles(y=Y, x=X.flip(0)), "each place once"),  # from right to left
    (Roles(y=X, x=Y), "each place once"),  # column by column
    (Roles(y=Y * 0, x=X), "each place once"),
    (
        Roles(y=torch.stack([Y, torch.arange(16) // 8]), x=torch.stack([X, torch.arange(16) % 8])),
        "the images of a batch fill one grid",
    ),
)


@pytest.mark.parametrize(("roles", "says"), BAD_GRIDS)
def test_tokens_that_fill_no_grid_are_refused(roles, says):
    with pytest.raises(ValueError, match=says):
        asked(roles=roles, window=3)


def test_a_grid_that_is_not_said_is_asked_for():
    with pytest.raises(ValueError, match=r"roles=Roles.grid\(rows, columns\)"):
        attend(*qkv((4, 4)), NAME, "self")
    with pytest.raises(ValueError, match="sides"):
        Roles.grid(2, 2, 2, 2)


def test_masks_and_other_patterns_are_refused():
    with pytest.raises(Unsupported, match="a mask beside a grid"):
        asked(mask=torch.ones(16, dtype=torch.bool))
    for pattern in ("causal_self", "cross", "causal_cross"):
        with pytest.raises(Unsupported, match="an axis may be causal"):
            asked(pattern=pattern)


def test_a_grid_may_be_said_by_labels_for_all_rows_or_for_each():
    wanted = asked(window=3).out
    for roles in (Roles(y=Y, x=X), Roles(y=Y[None], x=X[None]), Roles(document=Y, x=X, y=Y).reorder([0, 0])):
        assert torch.equal(asked(roles=roles, window=3).out, wanted)
