"""GTSP's own laws: open masks are a plain layer, soft ones turn hard, what is left out is not computed, sizes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.gtsp import flops
from regard.ops.prenorm import layer_of, slow_layer
from regard.ops.soft_topk import log_mask

PAGE = catalog.get("gtsp")
PATHS = (PAGE.reference, PAGE.fast)
OPEN = {"tokens": 1.0, "heads": 1.0, "weights": 1.0}


def inputs(cfg, width=8, heads=2, n=7, **params):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = PAGE.init(cfg, {"width": width, "heads": heads})
        drawn = {name: (p + 0.3 * torch.randn_like(p)).double() for name, p in drawn.items()}
        x = torch.randn(2, n, width, dtype=torch.float64)
    return x, Call("self", params=drawn | params)


def ask(path, cfg, x, call):
    return path(x, cfg, call)[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hard", [True, False])
def test_open_masks_are_a_plain_layer(path, hard):
    cfg = PAGE.configure(**OPEN, hard=hard)
    x, call = inputs(cfg, gate=torch.full((1,), 1e3, dtype=torch.float64))
    plain = torch.stack([slow_layer(text, layer_of(call.params, "layer", ()), cfg.eps) for text in x])
    torch.testing.assert_close(ask(path, cfg, x, call), plain, rtol=1e-10, atol=1e-12)
    assert (plain - x).abs().mean() > 0.1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"tokens": 0.3}, {"heads": 0.5, "weights": 0.8}])
def test_soft_masks_turn_hard(path, options):
    """At low temperatures, token by token, head by head, weight by weight."""
    apart = []
    for temperature in (1.0, 1e-5):
        soft = PAGE.configure(**options, temperature=temperature)
        x, call = inputs(soft)
        hard = ask(PAGE.reference, PAGE.configure(**options, hard=True), x, call)
        apart.append((ask(path, soft, x, call) - hard).abs().max().item())
    assert apart[1] < 1e-6 < 1e-2 < apart[0]


@pytest.mark.parametrize("path", PATHS)
def test_the_best_tokens_are_kept_and_the_others_pass_on(path):
    cfg = PAGE.configure(**OPEN | {"tokens": 0.5}, hard=True)
    x, call = inputs(cfg)
    p = layer_of(call.params, "layer", ())
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], p["norm"][0], p["norm_bias"][0], cfg.eps)
    best = (normed @ call.params["score"])[..., 0].topk(3).indices.sort().values
    out = ask(path, cfg, x, call)
    for row, kept in enumerate(best):
        wanted = x[row].index_copy(0, kept, slow_layer(x[row, kept], p, cfg.eps))
        torch.testing.assert_close(out[row], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_heads_that_are_left_out_say_nothing(path):
    cfg = PAGE.configure(**OPEN | {"heads": 0.5}, hard=True)
    scores = torch.tensor([0.1, 0.7, -0.2, 0.3], dtype=torch.float64)
    x, call = inputs(cfg, heads=4, head_score=scores)
    out = call.params["layer_out"].clone()
    out[[0, 2]] = 0
    whole = PAGE.configure(**OPEN, hard=True)
    wanted = ask(path, whole, x, call.with_(params={**call.params, "layer_out": out}))
    torch.testing.assert_close(ask(path, cfg, x, call), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_weights_of_each_head_are_kept(path):
    cfg = PAGE.configure(**OPEN | {"weights": 0.25}, hard=True)
    x, call = inputs(cfg)
    fewer = dict(call.params)
    for name in ("layer_qkv", "layer_out", "layer_up", "layer_down"):
        size = fewer[name].abs().flatten(-2)
        bar = size.topk(size.shape[-1] // 4).values[..., -1, None, None]
        fewer[name] = fewer[name] * (fewer[name].abs() >= bar)
    wanted = ask(path, PAGE.configure(**OPEN, hard=True), x, call.with_(params=fewer))
    torch.testing.assert_close(ask(path, cfg, x, call), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", [0.0, -0.1, 0.1])
def test_a_layer_is_left_out_where_its_gate_is_not_above_zero(path, gate):
    cfg = PAGE.configure(hard=True)
    x, call = inputs(cfg, gate=torch.tensor([gate], dtype=torch.float64))
    assert torch.equal(ask(path, cfg, x, call), x) == (gate <= 0)


def test_every_mask_is_learned_while_it_is_soft():
    cfg = PAGE.configure()
    x, call = inputs(cfg)
    params = {name: p.requires_grad_() for name, p in call.params.items()}
    ask(PAGE.fast, cfg, x, call.with_(params=params)).square().sum().backward()
    assert all(params[name].grad.abs().max() > 1e-6 for name in ("score", "head_score", "gate"))


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 1.0), (0.8, 0.75), (0.05, 0.1)])
def test_the_operations_are_those_that_torch_counts(shares):
    cfg = PAGE.configure(tokens=shares[0], heads=shares[1], weights=1.0, hard=True, expand=3)
    x, call = inputs(cfg, width=16, heads=4, n=10)
    # the counter knows no attention that is one kernel on a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ask(PAGE.fast, cfg, x[:1], call)
    assert counter.get_total_flops() == flops(cfg, 10, width=16, heads=4)


def test_fewer_weights_are_counted():
    whole, half = (PAGE.configure(**OPEN | {"weights": share}, hard=True) for share in (1.0, 0.5))
    attention = 4 * 10 * 10 * 16
    counts = [flops(cfg, 10, width=16, heads=4) - attention for cfg in (whole, half)]
    assert counts[0] == 2 * counts[1]


def test_masks_that_are_not_there_take_no_share():
    """-inf stands for no token: the bar lies between those that are there, and gradients are finite."""
    score = torch.tensor([3.0, -torch.inf, 1.0, 2.0], requires_grad=True)
    mask = log_mask(score, 2, 3, 1.0)
    torch.testing.assert_close(mask[[0, 2, 3]].exp(), torch.tensor([1.5, -0.5, 0.5]).sigmoid())
    mask[[0, 2, 3]].sum().backward()
    assert score.grad.isfinite().all()


def test_settings_are_checked():
    for name in ("tokens", "heads", "weights"):
        for share in (0.0, 1.1):
            with pytest.raises(ValueError, match=f"0 < {name} <= 1"):
                PAGE.configure(**{name: share})
    with pytest.raises(ValueError, match="temperature > 0"):
        PAGE.configure(temperature=0.0)
