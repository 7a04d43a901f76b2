"""Focus-DETR: what is not kept stays bit for bit, torch's own attention on what is, levels, shares, losses."""

import math
from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.focus_detr import categories, foreground, kept
from regard.ops.grid.foreground import drawn_scores, scores, slow_scores

PAGE = catalog.get("focus_detr")
PATHS = (PAGE.reference, PAGE.fast)
WIDTH, HEADS, SIDES = 12, 3, (5, 6)
SMALL = PAGE.configure(keep=0.4, cascade=(1.0,), layers=1, objects=5, levels=3, classes=4)


def inputs(cfg=SMALL, sides=SIDES, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = PAGE.init(cfg, {"width": WIDTH, "heads": HEADS})
        params = {n: (p + 0.1 * torch.randn_like(p)).double() for n, p in params.items()}
        x = torch.randn(2, math.prod(sides), WIDTH, dtype=torch.float64)
    return x, Call("self", params=params, grid=sides)


def chosen(x, cfg, call):
    """Places of what is kept, and of the objects in it, by plain sorting, for each image."""
    s, named = foreground(x, cfg, call)[0], categories(x, call).amax(2)
    for row in range(len(x)):
        first = s[row].argsort(descending=True)[: kept(cfg, x.shape[1])].tolist()
        yield first, sorted(first, key=lambda i: -(s[row, i] * named[row, i]).item())[: cfg.objects]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_kept_stays_bit_for_bit(path, dtype):
    x, call = inputs()
    x = (1e3 * x).to(dtype)
    call = call.with_(params={name: p.to(dtype) for name, p in call.params.items()})
    out = path(x, SMALL, call)[0]
    for row, (first, _) in enumerate(chosen(x, SMALL, call)):
        assert len(first) == 12
        others = [i for i in range(30) if i not in first]
        assert torch.equal(out[row, others], x[row, others])
        assert (out[row, first] != x[row, first]).any(1).all()


@pytest.mark.parametrize("path", PATHS)
def test_of_equal_scores_the_first_is_kept(path):
    x, call = inputs()
    p = {**call.params, "score_4": torch.zeros_like(call.params["score_4"])}
    out = path(x, SMALL, call.with_(params=p))[0]
    assert (out != x).any(2).tolist() == [[i < 12 for i in range(30)]] * 2


def torch_attention(p, which):
    layer = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        layer.in_proj_weight.copy_(p["qkv"][which].flatten(0, 2))
        layer.in_proj_bias.copy_(p["qkv_bias"][which].flatten())
        layer.out_proj.weight.copy_(p["out"][which])
        layer.out_proj.bias.copy_(p["out_bias"][which])
    return layer


@pytest.mark.parametrize("path", PATHS)
def test_objects_ask_each_other_then_all_that_is_kept_asks_all_tokens(path):
    x, call = inputs()
    p, out = call.params, path(x, SMALL, call)[0]
    norms = [
        lambda t, i=i: torch.nn.functional.layer_norm(t, (WIDTH,), p["norm"][i], p["norm_bias"][i])
        for i in range(3)
    ]
    for row, (first, objects) in enumerate(chosen(x, SMALL, call)):
        y = x[row].clone()
        own = y[objects][None]
        y[objects] = norms[0](own + torch_attention(p, 0)(own, own, own)[0])[0]
        y, source = y[first][None], x[row][None]
        y = norms[1](y + torch_attention(p, 1)(y, source, source)[0])
        y = norms[2](y + (y @ p["up"].mT + p["up_bias"]).relu() @ p["down"].mT + p["down_bias"])
        torch.testing.assert_close(out[row, first], y[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_only_objects_are_refined_twice(path):
    x, call = inputs()
    moved = {name: p.clone() for name, p in call.params.items()}
    moved["out"][0] *= 2
    far = (path(x, SMALL, call.with_(params=moved))[0] - path(x, SMALL, call)[0]).abs().amax(2) > 1e-9
    for row, (_, objects) in enumerate(chosen(x, SMALL, call)):
        assert sorted(objects) == far[row].nonzero()[:, 0].tolist()


def test_without_factors_a_level_is_scored_alone():
    x, call = inputs()
    p = {**call.params, "alpha": torch.zeros(2, dtype=torch.float64)}
    found = foreground(x, SMALL, call.with_(params=p))
    assert [s.shape[1] for s in found] == [30, 9, 4]
    image = x.mT.unflatten(2, SIDES)
    for level, s in enumerate(found):
        side, means = 2**level, []
        for i in range(0, SIDES[0], side):
            means += [image[:, :, i : i + side, j : j + side].mean((2, 3)) for j in range(0, SIDES[1], side)]
        sides = tuple(-(-n // side) for n in SIDES)
        alone = {**p, "level": p["level"][level : level + 1]}
        torch.testing.assert_close(s, scores(torch.stack(means, 1), sides, alone, 1, SMALL.eps)[0])
    assert (foreground(x, SMALL, call)[0] - found[0]).abs().min() > 0


@pytest.mark.parametrize("sides", [(5, 6), (1, 9), (16, 16), (1, 1)])
def test_both_ways_of_scoring_agree(sides):
    x, call = inputs(PAGE.configure(levels=4), sides)
    p = {**call.params, "alpha": 5 * call.params["alpha"]}
    for image, found in zip(x, scores(x, sides, p, 4, 1e-5)[0], strict=True):
        wanted = slow_scores(image.mT.unflatten(1, sides), p, 4, 1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_factor_multiplies_what_the_map_of_scores_reads():
    """With maps that pass on one channel a score is that of T times 1 + α Up(S)."""
    p = {name: torch.zeros_like(t) for name, t in drawn_scores(4, 2).items()}
    p["memory_norm_bias"] += torch.tensor([100.0, 0, 0, 0])  # T = 100 in one channel; GELU leaves it
    p["alpha"] += 0.02
    for name in ("score_1", "score_2", "score_3", "score_4"):
        p[name][0, 0] = 1.0
    fine, coarse = scores(torch.zeros(1, 16, 4), (4, 4), p, 2, 1e-5)
    torch.testing.assert_close(coarse, torch.full((1, 4), 100.0))
    torch.testing.assert_close(fine, torch.full((1, 16), 300.0))


def test_shares_shrink_and_are_drawn_out_over_the_layers():
    cfg = PAGE.config()
    assert [kept(replace(cfg, layers=3, layer=i), 100) for i in range(3)] == [50, 30, 20]
    assert [kept(replace(cfg, layers=12, layer=i), 100) for i in (0, 1, 2, 11)] == [50, 50, 40, 10]
    assert kept(cfg, 1) == 1 and kept(replace(cfg, keep=0.29), 100) == 29


def test_losses_teach_scores_and_classes_and_the_output_does_not():
    x, call = inputs()
    params = {name: p.requires_grad_() for name, p in call.params.items()}
    choice = ("score_1", "score_4", "memory", "level", "alpha", "class")
    PAGE.fast(x, SMALL, call)[0].square().sum().backward()
    assert all(params[name].grad is None for name in choice) and params["qkv"].grad.abs().max() > 0
    (foreground(x, SMALL, call)[0].sum() + categories(x, call).sum()).backward()
    for name in choice:
        assert params[name].grad.abs().max() > 1e-9, name


def test_a_class_is_one_in_a_hundred_to_begin_with():
    bias = PAGE.init(SMALL, {"width": WIDTH, "heads": HEADS})["class_bias"]
    torch.testing.assert_close(bias.sigmoid(), torch.full((4,), 0.01))


def test_autocast_changes_no_scores():
    x, call = inputs()
    x, call = x.float(), call.with_(params={name: p.float() for name, p in call.params.items()})
    wanted = [*foreground(x, SMALL, call), categories(x, call)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*foreground(x, SMALL, call), categories(x, call)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.0}, {"keep": 1.1}, {"cascade": ()}, {"cascade": (1.0, 0.0)}, {"layer": 1}, {"layer": -1}]
    + [{name: 0} for name in ("objects", "levels", "classes", "expand")],
)  # fmt: skip
def test_settings_that_have_no_meaning_are_refused(settings):
    with pytest.raises(ValueError, match="must hold"):
        PAGE.configure(**settings)


@pytest.mark.parametrize(("width", "heads"), [(12, 5), (6, 2)])
def test_widths_that_do_not_part_are_refused(width, heads):
    with pytest.raises(ValueError, match="a multiple of"):
        PAGE.init(SMALL, {"width": width, "heads": heads})
