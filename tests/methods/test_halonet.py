"""Halo attention against masked dense attention, borders, ragged blocks; and the windows that it is made of."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.mechanisms.grid import halonet as page
from regard.ops.grid import from_windows, window_places, windows

PATHS = [page.METHOD.reference, page.METHOD.fast]
each_path = pytest.mark.parametrize("path", PATHS, ids=["reference", "fast"])


def drawn(sides, cfg, heads=2, groups=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, steps = sides[0] * sides[1], 2 * (cfg.block + cfg.halo) - 1
    params = {"rows": draw(steps, 3), "columns": draw(steps, 3)} if cfg.relative else {}
    return draw(2, heads, n, 3), draw(2, groups, n, 3), draw(2, groups, n, 2), params


def dense(q, k, v, params, sides, cfg):
    """All pairs of pixels, those hidden that do not stand in the window of the query's block."""
    place = torch.cartesian_prod(*(torch.arange(side) for side in sides))  # [N, 2]
    first = place // cfg.block * cfg.block
    near = (place >= first[:, None] - cfg.halo) & (place < first[:, None] + cfg.block + cfg.halo)  # [N, N, 2]
    s = q @ k.mT
    if cfg.relative:
        step = (place - place[:, None] + cfg.block + cfg.halo - 1).clamp(0, len(params["rows"]) - 1)
        for name, at in zip(("rows", "columns"), step.unbind(-1), strict=True):
            s = s + torch.einsum("bhnd,nmd->bhnm", q, params[name][at])
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    return (s * scale).masked_fill(~near.all(-1), -torch.inf).softmax(-1) @ v


SETTINGS = [
    ((8, 8), dict(block=4, halo=1)),
    ((6, 9), dict(block=3, halo=2, scale=0.3)),
    ((7, 10), dict(block=4, halo=2)),  # last blocks of 3 and 2
    ((5, 9), dict(block=4, halo=0)),
    ((3, 11), dict(block=8, halo=3)),  # a block higher than the image
    ((6, 6), dict(block=2, halo=5)),  # a halo that ends beyond the image
    ((6, 6), dict(block=2, halo=3, relative=False)),
    ((1, 5), dict(block=1, halo=1)),
    ((12, 10), dict(block=5, halo=9)),
]


@each_path
@pytest.mark.parametrize(("sides", "settings"), SETTINGS)
def test_is_masked_dense_attention(path, sides, settings):
    cfg = page.Config(**settings)
    q, k, v, params = drawn(sides, cfg)
    out = path(q, k, v, cfg, Call("self", grid=sides, params=params))[0]
    torch.testing.assert_close(out, dense(q, k, v, params, sides, cfg), rtol=1e-10, atol=1e-10)


@each_path
def test_nothing_beyond_the_image_is_read(path):
    """Values of one give outputs of one: keys of zeros beyond a border would take a share."""
    cfg = page.Config(block=2, halo=2)
    q, k, v, params = drawn((5, 6), cfg)
    out = path(q, k, torch.ones_like(v), cfg, Call("self", grid=(5, 6), params=params))[0]
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-12)


@each_path
def test_queries_of_a_block_read_the_same_keys(path):
    """What moves when one value moves are whole blocks: those whose halo reaches it."""
    cfg, sides = page.Config(block=3, halo=1), (9, 9)
    q, k, v, params = drawn(sides, cfg)
    call, moved = Call("self", grid=sides, params=params), v.clone()
    moved[:, :, 2 * 9 + 4] += 1  # the last row of its block
    change = (path(q, k, moved, cfg, call)[0] - path(q, k, v, cfg, call)[0]).abs().amax((0, 1, 3)) > 1e-12
    wanted = torch.zeros(sides, dtype=torch.bool)
    wanted[:6, 3:6] = True
    assert torch.equal(change.view(sides), wanted)


@each_path
def test_an_image_moved_by_a_block_is_read_the_same_and_by_less_is_not(path):
    cfg, sides = page.Config(block=3, halo=2), (15, 15)
    q, k, v, params = drawn(sides, cfg)

    def moved(by):
        """Of the image moved down, what its rows 3 to 9 give, which read rows 1 to 14 at most."""
        rolled = (t.unflatten(2, sides).roll(by, 2).flatten(2, 3) for t in (q, k, v))
        out = path(*rolled, cfg, Call("self", grid=sides, params=params))[0]
        return out.unflatten(2, sides).roll(-by, 2)[:, :, 3:9]

    torch.testing.assert_close(moved(3), moved(0), rtol=1e-12, atol=1e-12)
    for by in (1, 2):
        assert (moved(by) - moved(0)).abs().max() > 1e-2


STEPS = [
    ("columns", (1, 1), (1, 3)),
    ("columns", (0, 1), (0, 3)),
    ("rows", (1, 1), (3, 1)),
    ("rows", (0, 0), (2, 0)),
]


@each_path
@pytest.mark.parametrize(("name", "query", "read"), STEPS)
def test_vectors_are_met_by_true_steps_down_and_right(path, name, query, read):
    """Of two steps to the right, or down, and none on the other axis: one pixel takes all."""
    cfg, none = page.Config(block=2, halo=2, scale=1.0), 3
    q, k, v = torch.ones(1, 1, 16, 1), torch.zeros(1, 1, 16, 1), torch.arange(16.0).view(1, 1, 16, 1)
    params = {n: torch.full((7, 1), -60.0) for n in ("rows", "columns")}
    for axis, table in params.items():
        table[none + 2 if axis == name else none] = 0
    out = path(q, k, v, cfg, Call("self", grid=(4, 4), params=params))[0].view(4, 4)
    assert out[query].item() == pytest.approx(4 * read[0] + read[1])


@pytest.mark.parametrize(("settings", "says"), [({"block": 0}, "block >= 1"), ({"halo": -1}, "halo >= 0")])
def test_settings_without_a_meaning_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        page.Config(**settings)


WINDOWS = [
    ((7,), (3,), (2,), ((1, 1),)),
    ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((8, 7), (4, 3), (2, 3), ((1, 2), (0, 3))),
    ((4, 4), (6, 2), (4, 2), ((1, 1), (0, 0))),
    ((3, 4, 5), (2, 3, 2), (1, 2, 2), ((1, 0), (1, 1), (0, 1))),
]


@pytest.mark.parametrize(("sides", "kernel", "stride", "padding"), WINDOWS)
def test_windows_hold_what_stands_there_and_zeros_beyond(sides, kernel, stride, padding):
    at = window_places(sides, kernel, stride, padding)
    count = torch.Size(sides).numel()
    image = F.pad(torch.arange(1, count + 1).view(sides), [p for pair in reversed(padding) for p in pair])
    starts = [range(0, n - w + 1, s) for n, w, s in zip(image.shape, kernel, stride, strict=True)]
    wanted = [
        image[tuple(slice(i, i + w) for i, w in zip(start, kernel, strict=True))].flatten()
        for start in itertools.product(*starts)
    ]
    assert torch.equal(at + 1, torch.stack(wanted))
    x = torch.randn(6, count, 4, generator=torch.Generator().manual_seed(0))
    there = (at >= 0)[..., None]
    assert torch.equal(windows(x, at), torch.where(there, x[:, at.clamp(min=0)], 0))


def test_windows_give_back_gradients_to_places_alone():
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    at = window_places((3, 4), (3, 3), (1, 1), ((1, 1), (1, 1)))
    assert torch.autograd.gradcheck(lambda x: windows(x, at), x)
    grad = torch.autograd.grad(windows(x, at).sum(), x)[0]
    times = torch.bincount(at[at >= 0], minlength=12).view(1, 12, 1)
    assert torch.equal(grad, times.expand_as(grad).double())


@pytest.mark.parametrize("sides", [(6, 6), (7, 5)])
def test_windows_that_hold_each_place_once_go_back(sides):
    """Last ones that are filled up too."""
    x = torch.randn(6, sides[0] * sides[1], 4, generator=torch.Generator().manual_seed(0))
    at = window_places(sides, (3, 2), (3, 2), ((0, -sides[0] % 3), (0, -sides[1] % 2)))
    assert torch.equal(from_windows(windows(x, at), at, x.shape[1]), x)
