"""TAP and ADL: without branches a plain ViT layer, pools by hand, the loss pair by pair, gradients that reach all."""

import math
from functools import partial

import pytest
import torch

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.tap_adl import adl, tap, with_weights

PAGE = catalog.get("tap_adl")
PATHS = (PAGE.reference, PAGE.fast)
WIDTH, HEADS, SIDES = 12, 3, (3, 4)


def inputs(cfg, sides=SIDES, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = PAGE.init(cfg, {"width": WIDTH, "heads": HEADS})
        params = {n: (p + 0.1 * torch.randn_like(p)).double() for n, p in params.items()}
        x = torch.randn(2, math.prod(sides), WIDTH, dtype=torch.float64)
    return x, Call("self", params=params, grid=sides)


def torch_layer(p, cfg):
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, cfg.expand * WIDTH, 0.0, "gelu", cfg.eps, batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(p["qkv"].flatten(0, 2))
        layer.self_attn.in_proj_bias.copy_(p["qkv_bias"].flatten())
        for mine, name in (
            (layer.self_attn.out_proj, "out"), (layer.linear1, "up"), (layer.linear2, "down"),
            (layer.norm1, "ln_1"), (layer.norm2, "ln_2"),
        ):  # fmt: skip
            mine.weight.copy_(p[name])
            mine.bias.copy_(p[name + "_bias"])
    return layer


@pytest.mark.parametrize("path", PATHS)
def test_with_one_branch_it_is_a_plain_layer(path):
    cfg = PAGE.configure(branches=1)
    x, call = inputs(cfg)
    torch.testing.assert_close(path(x, cfg, call)[0], torch_layer(call.params, cfg)(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_only_attention_sees_the_mixture(path):
    """A plain layer whose attention is asked the pooled tokens; the residual is of the tokens themselves."""
    cfg = PAGE.config()
    x, call = inputs(cfg)
    plain = torch_layer(call.params, cfg)
    y = plain.norm1(by_hand(x, call.params, SIDES))
    mid = x + plain.self_attn(y, y, y, need_weights=False)[0]
    wanted = mid + plain.linear2(torch.nn.functional.gelu(plain.linear1(plain.norm2(mid))))
    torch.testing.assert_close(path(x, cfg, call)[0], wanted, rtol=1e-9, atol=1e-10)


def by_hand(x, p, sides):
    """The mixture of torch's own convolutions, and of averages of places that are looked up one by one."""
    image = x.mT.unflatten(2, sides)
    conv = torch.nn.functional.conv2d
    middle = (
        conv(image, p["mix_in"], padding=1) * p["mix_scale"][:, None, None] + p["mix_shift"][:, None, None]
    )
    m = conv(middle, p["mix_out"], padding=1).softmax(1)
    out = torch.zeros_like(image)
    for i in range(sides[0]):
        for j in range(sides[1]):
            for k in range(m.shape[1]):
                near = [(i + k * dy, j + k * dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)] if k else [(i, j)]
                inside = [image[:, :, a, b] for a, b in near if 0 <= a < sides[0] and 0 <= b < sides[1]]
                out[:, :, i, j] += m[:, k, None, i, j] * sum(inside) / len(near)
    return out.flatten(2).mT


@pytest.mark.parametrize("sides", [(3, 4), (1, 6), (5, 2), (1, 1)])
def test_pools_reach_off_the_image(sides):
    x, call = inputs(PAGE.config(), sides)
    torch.testing.assert_close(tap(x, call.params, sides), by_hand(x, call.params, sides))


def test_weights_are_those_of_the_layer_and_teach_it():
    cfg = PAGE.config()
    x, call = inputs(cfg)
    params = {name: p.requires_grad_() for name, p in call.params.items()}
    out, weights = with_weights(x, cfg, call)
    torch.testing.assert_close(out, PAGE.reference(x, cfg, call)[0], rtol=1e-9, atol=1e-10)
    assert weights.shape == (2, HEADS, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # from the weights the output follows
    y = torch_layer(params, cfg).norm1(by_hand(x, params, SIDES))
    v = torch.einsum("bnc,hdc->bhnd", y, params["qkv"][2]) + params["qkv_bias"][2][:, None]
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    mid = x + mixed @ params["out"].mT + params["out_bias"]
    zero = {name: torch.zeros_like(p) if name.startswith("down") else p for name, p in params.items()}
    torch.testing.assert_close(with_weights(x, cfg, call.with_(params=zero))[0], mid)
    # random weights are near uniform: a lower bar leaves some
    adl([weights], above=0.5).backward()
    for name in ("mix_in", "mix_out", "qkv", "ln_1"):
        assert params[name].grad.abs().max() > 1e-8, name
    assert params["up"].grad is None


def test_autocast_changes_no_weights():
    cfg = PAGE.config()
    x, call = inputs(cfg)
    x, call = x.float(), call.with_(params={name: p.float() for name, p in call.params.items()})
    wanted = with_weights(x, cfg, call)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_weights(x, cfg, call)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def slow_adl(layers, above):
    """Plain lists: cosines of each row with the mean row, both without their small weights."""
    total = []
    for weights in layers:
        for image in weights.mean(1).tolist():
            n = len(image)
            mean = [sum(row[j] for row in image) / n for j in range(n)]
            rows = [[w if w > above / n else 0.0 for w in row] for row in (mean, *image)]
            norms = [math.sqrt(sum(w * w for w in row)) for row in rows]
            for row, norm in zip(rows[1:], norms[1:], strict=True):
                dot = sum(a * b for a, b in zip(row, rows[0], strict=True))
                total.append(dot / (norm * norms[0]) if norm * norms[0] else 0.0)
    return sum(total) / len(total)


def above_of(above, weights):
    return adl([weights], above)


def test_the_loss_is_the_loop():
    draw = torch.Generator().manual_seed(0)
    layers = [
        (s * torch.randn(3, 2, 7, 7, generator=draw, dtype=torch.float64)).softmax(-1)
        for s in (0.5, 2.0, 4.0)
    ]
    layers[2] = layers[2] + 4 * torch.eye(7, dtype=torch.float64)[2]  # all look at the third token
    layers[2] = layers[2] / layers[2].sum(-1, keepdim=True)
    for above in (0.5, 1.0, 2.0):
        wanted = slow_adl(layers, above)
        assert 0.05 < wanted < 0.95
        assert adl(layers, above).item() == pytest.approx(wanted, abs=1e-12)
        # both the rows and their mean are taught
        of, at = partial(above_of, above), layers[0].clone().requires_grad_()
        assert torch.autograd.gradcheck(of, at, raise_exception=False)
    assert adl(layers).item() == adl(layers, 2.0).item()
    by_layer = [adl([weights]).item() for weights in layers]
    assert max(by_layer[:2]) < 0.2 and by_layer[2] > 0.8


def test_weights_at_the_bar_count_as_none_and_uniform_attention_costs_nothing():
    uniform = torch.full((1, 1, 4, 4), 0.25, requires_grad=True)
    loss = adl([uniform])
    loss.backward()
    assert loss.item() == 0 and bool(uniform.grad.isfinite().all())
    halves = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 1, 4, 4)
    assert adl([halves]).item() == 0
    assert adl([halves], above=1.9).item() == pytest.approx(1)


def test_a_step_down_the_loss_sets_rows_apart():
    """Scores that all look at one token, taught by the loss alone."""
    scores = 2.5 * torch.eye(12, dtype=torch.float64)[None, None]
    scores[..., 0] = 3.0
    scores.requires_grad_()
    optimizer, first = torch.optim.Adam([scores], 0.05), None
    for _ in range(60):
        loss = adl([scores.softmax(-1)])
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.8 and loss.item() < 0.5 * first
