"""Aggregated attention: one softmax over near places and averages, and what stands outside of it."""

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.mechanisms.grid import transnext as page
from regard.ops.grid import continuous_bias, window_sums

DIMS = {"heads": 2, "kv_heads": 1, "key": 4, "value": 3, "width": 6}
IMAGES = ((8, 8), (5, 7), (3, 12))


def drawn(sides, cfg):
    """q, k, v, x and parameters off their special values, in float64."""
    g, n = torch.Generator().manual_seed(0), sides[0] * sides[1]
    shapes = (2, 2, n, 4), (2, 1, n, 4), (2, 1, n, 3), (2, n, 6)
    q, k, v, x = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    torch.manual_seed(0)
    params = {
        name: p.double() + 0.3 * torch.randn_like(p.double()) for name, p in page.init(cfg, DIMS).items()
    }
    return q, k, v, x, params


def both(sides, cfg, q, k, v, x, params):
    call = Call("self", x=x, params=params, grid=sides)
    return [path(q, k, v, cfg, call)[0] for path in (page.METHOD.reference, page.METHOD.fast)]


@pytest.mark.parametrize("options", [{}, {"window": 5, "pool": 2}, {"ratio": 3, "length": 7.0}])
@pytest.mark.parametrize("sides", IMAGES)
def test_both_paths_on_images_that_their_averages_do_not_divide(sides, options):
    cfg = page.Config(hidden=8, **options)
    torch.testing.assert_close(*both(sides, cfg, *drawn(sides, cfg)))


@pytest.mark.parametrize("sides", IMAGES)
def test_weights_of_near_places_and_averages_sum_to_one_together(sides):
    cfg = page.Config(hidden=8)
    q, k, v, x, params = drawn(sides, cfg)
    off = {name: torch.zeros_like(params[name]) for name in ("tokens", "token_bias", "pool_v")}
    params |= off | {"pool_v_bias": torch.ones_like(params["pool_v_bias"])}
    for out in both(sides, cfg, q, k, torch.ones_like(v), x, params):
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("sides", IMAGES)
def test_learned_weights_of_near_values_stand_outside_of_the_softmax(sides):
    """They read the query without its embedding, its temperature or log N, and nothing beyond the image."""
    cfg = page.Config(hidden=8)
    q, k, v, x, params = drawn(sides, cfg)
    off = {name: torch.zeros_like(params[name]) for name in ("tokens", "token_bias")}
    weights = F.normalize(q, dim=-1) @ params["tokens"] + params["token_bias"][:, None]
    wanted = window_sums(weights.mT, v, sides, 3)
    for out, without in zip(both(sides, cfg, q, k, v, x, params), both(sides, cfg, q, k, v, x, params | off)):
        torch.testing.assert_close(out - without, wanted)


@pytest.mark.parametrize("sides", IMAGES)
def test_log_n_counts_what_a_place_reads(sides):
    """A window of one place reads one place everywhere, and all averages: the same N for all, which may be given."""
    averages = (sides[0] // 2) * (sides[1] // 2)
    cfg = page.Config(window=1, hidden=8)
    inputs = drawn(sides, cfg)
    counted = both(sides, cfg, *inputs)
    for length, alike in ((1 + averages, True), (2 + averages, False)):
        for one, other in zip(counted, both(sides, page.Config(window=1, hidden=8, length=length), *inputs)):
            assert torch.allclose(one, other, rtol=0, atol=1e-12) == alike


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (4, 4), (5, 2)])
def test_the_bias_is_that_of_the_steps_to_the_middle(counts):
    """As when adaptive pooling averages the places themselves."""
    sides, by = (8, 5), (4, 9)
    counts = (counts[0], min(counts[1], sides[1]))

    def mlp(steps):
        return torch.stack(
            [steps[..., 0] + 2 * steps[..., 1], (3 * steps[..., 0]).sin() - steps[..., 1] ** 2], -1
        )

    found = continuous_bias(mlp, sides, counts, by, torch.zeros((), dtype=torch.float64))
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in sides))
    middles = F.adaptive_avg_pool2d(places.mT.unflatten(1, sides), counts).flatten(1).mT
    part = (places[:, None] - middles) / (torch.tensor(by) - 1) * 8
    wanted = mlp(part.sign() * (1 + part.abs()).log2() / 3)
    torch.testing.assert_close(found, wanted.permute(2, 0, 1))


def test_steps_are_counted_by_the_side_at_training():
    inputs = drawn((6, 6), page.Config(hidden=8))
    own = both((6, 6), page.Config(hidden=8), *inputs)
    for side, alike in ((6, True), (5, False)):
        for one, other in zip(own, both((6, 6), page.Config(hidden=8, trained=side), *inputs)):
            assert torch.allclose(one, other, rtol=0, atol=1e-12) == alike
