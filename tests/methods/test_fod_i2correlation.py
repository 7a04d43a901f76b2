"""FOD: torch's own attention, targets place by place, what is taught to whom, and which places are strange."""

import math

import pytest
import torch

from regard import catalog
from regard.core.call import Call
from regard.methods.blocks.fod_i2correlation import (
    FLOOR,
    anomaly,
    correlations,
    discrepancy,
    entropy,
    gaussian,
    learning,
    spreads,
)

PAGE = catalog.get("fod_i2correlation")
PATHS = (PAGE.reference, PAGE.fast, correlations)
WIDTH, HEADS, SIDES = 12, 3, (2, 3)
MAPS = {"both": ("intra", "inter"), "intra": ("intra",), "inter": ("inter",)}


def inputs(branches="both"):
    cfg = PAGE.configure(branches=branches, tokens=6, expand=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = PAGE.init(cfg, {"width": WIDTH, "heads": HEADS})
        params = {name: (p + 0.1 * torch.randn_like(p)).double() for name, p in params.items()}
        x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    return x, cfg, Call("self", params=params, grid=SIDES)


def torch_attention(x, of, p, name):
    """(values [B, N, C], weights [B, H, N, N]) of torch's layer, its output projection the identity."""
    layer = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        layer.in_proj_weight.copy_(p[f"{name}_qkv"].flatten(0, 2))
        layer.in_proj_bias.copy_(p[f"{name}_qkv_bias"].flatten())
        layer.out_proj.weight.copy_(torch.eye(WIDTH))
        layer.out_proj.bias.zero_()
    return layer(x, of, of, average_attn_weights=False)


@pytest.mark.parametrize("branches", MAPS)
@pytest.mark.parametrize("path", PATHS)
def test_it_is_torch_s_attention_and_norms(path, branches):
    x, cfg, call = inputs(branches)
    p, norm = call.params, torch.nn.functional.layer_norm
    of = {"intra": x, "inter": p["normal"].expand_as(x) if "normal" in p else None}
    seen = {name: torch_attention(x, of[name], p, name) for name in MAPS[branches]}
    z = x + seen[branches][0] if branches != "both" else seen["intra"][0] - seen["inter"][0]
    z = norm(z, (WIDTH,), p["ln_1"], p["ln_1_bias"], cfg.eps)
    middle = torch.nn.functional.gelu(z @ p["up"].mT + p["up_bias"])
    wanted = norm(z + middle @ p["down"].mT + p["down_bias"], (WIDTH,), p["ln_2"], p["ln_2_bias"], cfg.eps)
    out, *more = path(x, cfg, call)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    if path is correlations:
        for name, (weights, _) in more[0].items():
            torch.testing.assert_close(weights, seen[name][1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["intra", "inter"])
def test_targets_place_by_place(name):
    x, cfg, call = inputs()
    target = correlations(x, cfg, call)[1][name][1]
    s = torch.einsum("bnc,hac->bhna", x, call.params[f"{name}_sigma"])
    s = s + call.params[f"{name}_sigma_bias"][:, None]
    for h in range(HEADS):
        for i in range(6):
            v, u = (3 ** (1 / (1 + math.exp(-5 * t)) + 1e-5) - 1 for t in s[1, h, i].tolist())
            row = [
                math.exp(-((i // 3 - j // 3) ** 2) / (2 * v**2) - (i % 3 - j % 3) ** 2 / (2 * u**2))
                for j in range(6)
            ]
            wanted = torch.tensor([t / sum(row) for t in row], dtype=torch.float64)
            torch.testing.assert_close(target[1, h, i], wanted, rtol=1e-9, atol=1e-12)


def test_the_narrowest_target_is_the_place_itself():
    x, _, call = inputs()
    low = dict(call.params) | {"intra_sigma_bias": torch.full((HEADS, 2), -1e4)}
    target = gaussian(spreads(x.float(), {n: p.float() for n, p in low.items()}, "intra"), SIDES)
    torch.testing.assert_close(target, torch.eye(6).expand_as(target))


def draw(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).softmax(-1)


def test_discrepancy_and_entropy_are_the_loops():
    a, t = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4)

    def kl(p, q):
        return sum(x * math.log((x + FLOOR) / (y + FLOOR)) for x, y in zip(p, q, strict=True))

    for b in range(2):
        for i in range(4):
            rows = [(a[b, h, i].tolist(), t[b, h, i].tolist()) for h in range(3)]
            both = sum(kl(p, q) + kl(q, p) for p, q in rows) / 3
            assert discrepancy(a, t)[b, i].item() == pytest.approx(both)
            of = -sum(x * math.log(x + FLOOR) for p, _ in rows for x in p) / 3
            assert entropy(a)[b, i].item() == pytest.approx(of)


@pytest.mark.parametrize(("name", "sign"), [("intra", 1), ("inter", -1)])
def test_who_is_taught_what(name, sign):
    """A small step down the loss, on weights or on targets alone."""
    scores = [draw(seed, 1, 2, 5, 5).log().requires_grad_() for seed in (0, 1)]
    pair = tuple(s.softmax(-1) for s in scores)
    before, wide = discrepancy(*pair).mean().item(), entropy(pair[0]).mean().item()

    def after(constraint):
        loss = learning([{name: pair}], 0.5, constraint)
        slopes = torch.autograd.grad(loss, scores, retain_graph=True)
        return [(s - 0.1 * slope).softmax(-1).detach() for s, slope in zip(scores, slopes, strict=True)]

    weights, target = after(0.0)
    assert sign * (discrepancy(weights, pair[1]).mean().item() - before) > 1e-5
    assert sign * (discrepancy(pair[0], target).mean().item() - before) < -1e-5
    assert sign * (entropy(after(10.0)[0]).mean().item() - wide) > 1e-5
    value = learning([{name: pair}, {name: pair}]).item()
    assert value == pytest.approx(-sign * 0.5 * wide)


def test_a_place_that_misses_its_target_among_normal_features_is_strange():
    target = torch.eye(4)[None, None] * 0.9 + 0.025
    weights = target.clone()
    weights[..., 2, :] = 0.25
    error = torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    score = anomaly(error, [{"intra": (target, target), "inter": (weights, target)}])
    d = discrepancy(weights, target)[0, 2].item()
    wanted = (1 - math.exp(-d)) / (3 + math.exp(-d))
    torch.testing.assert_close(score, torch.tensor([[0.0, 0.0, wanted, 0.0]]))
    # in its own image it is the near one that is: normal places look far
    score = anomaly(error, [{"intra": (weights, target)}])
    torch.testing.assert_close(score[0, 1] / score[0, 2], torch.tensor(2 * math.exp(d)))


def test_settings_that_have_no_meaning_are_refused():
    for wrong in ({"tokens": 0}, {"expand": 0}, {"branches": "neither"}):
        with pytest.raises(ValueError, match=r"at least 1|branches is"):
            PAGE.configure(**wrong)
