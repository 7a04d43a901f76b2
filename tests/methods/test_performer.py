"""Performer's features: unbiased, better with more of them and when orthogonal, and stable without looking ahead."""

import pytest
import torch

from regard.core.call import Call
from regard.methods.mechanisms.linear import performer as page
from regard.ops import explicit, lower_right

D = 8
PATHS = {"reference": page.reference, "fast": page.METHOD.fast}


def run(path, q, k, v, cfg, params, **call):
    """The output of one path."""
    return PATHS[path](q, k, v, cfg, Call(params=params, **call))[0]


def drawn(n, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(1, 2, n, D, generator=g, dtype=torch.float64) for _ in range(3)]


def feature_params(cfg, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {n: p.double() for n, p in page.init(cfg, {"key": D}).items()}


def softmax(q, k, v):
    return explicit(q, k, v, scale=D**-0.5, mask=lower_right(q.shape[2], k.shape[2]))


def error(m, orthogonal=True, seeds=8):
    """Root mean square of (Performer - softmax) over draws of the features."""
    q, k, v = drawn(64, scale=0.6)
    cfg = page.Config(features=m, orthogonal=orthogonal)
    wanted = softmax(q, k, v)
    off = [run("fast", q, k, v, cfg, feature_params(cfg, s)) - wanted for s in range(seeds)]
    return torch.stack(off).square().mean().sqrt().item()


def test_error_falls_with_the_number_of_features():
    errors = [error(m) for m in (16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3  # 1/√64 = 1/8 where errors are not heavy-tailed
    assert errors[-1] < 0.03


def test_orthogonal_features_are_better():
    assert error(D, seeds=200) < error(D, orthogonal=False, seeds=200)


def test_products_of_features_are_unbiased():
    """The mean of φ(q)·φ(k) over draws is e^{q·k/√D}, within four standard errors, for vectors of moderate length."""
    q, k, _ = (t[0, 0] for t in drawn(4, scale=0.7))
    wanted = (q @ k.mT * D**-0.5).exp()
    for orthogonal in (True, False):
        cfg = page.Config(features=64, orthogonal=orthogonal)
        products = []
        for seed in range(400):
            params = feature_params(cfg, seed)
            a, b = (page.exponents(t, params["w"]).exp() for t in (q, k))
            products.append(a @ b.mT / cfg.features)
        drawn_products = torch.stack(products)
        spread = drawn_products.std(0) / len(products) ** 0.5
        off = (drawn_products.mean(0) - wanted).abs() / spread
        assert off.max() < 4


def logarithms(x, w):
    """w·x - |x|²/2 of x times D^(-1/4), written again."""
    x = x / D**0.25
    return x @ w.mT - x.square().sum(-1, keepdim=True) / 2


def quadratic(q, k, v, w, sees):
    """Oracle in logarithms: weights Σ_r e^{a_r + b_r} as they are, no largest exponent taken out."""
    a, b = logarithms(q, w), logarithms(k, w)
    scores = torch.logsumexp(a[:, :, :, None] + b[:, :, None], dim=-1)
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", ["self", "causal_self", "cross"])
def test_is_the_quadratic_sum_of_its_features(path, pattern):
    cfg = page.Config(features=24, chunk=16)
    params, (q, k, v) = feature_params(cfg), drawn(40, scale=2)
    sees = lower_right(40, 40) if pattern == "causal_self" else torch.ones(40, 40, dtype=torch.bool)
    out = run(path, q, k, v, cfg, params, pattern=pattern)
    torch.testing.assert_close(out, quadratic(q, k, v, params["w"], sees), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["self", "causal_self", "cross"])
def test_the_reference_is_that_sum_for_scores_of_1e4_too(pattern):
    """Exponents of -1e4 underflow as weights; as logarithms they keep all digits."""
    cfg = page.Config(features=24)
    params, (q, k, v) = feature_params(cfg), drawn(12, scale=100)
    sees = lower_right(12, 12) if pattern == "causal_self" else torch.ones(12, 12, dtype=torch.bool)
    out = run("reference", q, k, v, cfg, params, pattern=pattern)
    torch.testing.assert_close(out, quadratic(q, k, v, params["w"], sees), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_the_state_is_the_sums_at_the_largest_exponent_so_far(path):
    """S = Σ_s e^{b_s - c} (v_s, 1) and c = max b_s over the keys that are there, in float64 and after segments."""
    cfg = page.Config(features=6, chunk=4)
    params, (q, k, v) = feature_params(cfg), drawn(10)
    mask = torch.ones(1, 2, 10, dtype=torch.bool)
    mask[:, 0, 2], mask[:, :, 7] = False, False
    b = logarithms(k, params["w"]).masked_fill(~mask[..., None], -torch.inf)
    c = b.amax((-1, -2))
    wanted = (b - c[..., None, None]).exp().mT @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = None
    for cut in (slice(0, 4), slice(4, 5), slice(5, 10)):
        call = Call(key_mask=mask[..., cut], initial_state=state, params=params)
        state = PATHS[path](*(t[:, :, cut] for t in (q, k, v)), cfg, call)[1]
    torch.testing.assert_close(state[0], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[1], c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_fewer_queries_than_keys_are_the_last_rows_of_the_whole(path):
    cfg = page.Config(features=6, chunk=4)
    params, (q, k, v) = feature_params(cfg), drawn(10)
    whole = run(path, q, k, v, cfg, params)
    torch.testing.assert_close(run(path, q[:, :, 4:], k, v, cfg, params), whole[:, :, 4:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_whose_first_segment_is_hidden_is_the_rest_alone(path, dtype):
    """c stands at the lowest number of its dtype where nothing was seen, and what follows starts from there."""
    cfg = page.Config(features=6)
    params, (q, k, v) = feature_params(cfg), [t.to(dtype) for t in drawn(6)]
    hidden = Call(key_mask=torch.zeros(1, 1, 3, dtype=torch.bool), params=params)
    blind, state = PATHS[path](*(t[:, :, :3] for t in (q, k, v)), cfg, hidden)
    assert not blind.any() and not state[0].any() and state[1].isfinite().all()
    rest = [t[:, :, 3:] for t in (q, k, v)]
    out, end = PATHS[path](*rest, cfg, Call(initial_state=state, params=params))
    wanted, alone = PATHS[path](*rest, cfg, Call(params=params))
    torch.testing.assert_close(out, wanted)
    for one, other in zip(end, alone, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", PATHS)
def test_a_late_large_key_does_not_drown_early_rows(path):
    """A stabiliser over all keys would take e^{c} with c of the last key out of rows that do not see it."""
    cfg = page.Config(features=32)
    params, (q, k, v) = feature_params(cfg), [t.float() for t in drawn(6, scale=8)]
    k[:, :, -1] = 0.0  # exponent 0, where the others have some hundreds below 0
    params = {n: p.float() for n, p in params.items()}
    early = run(path, q, k, v, cfg, params)[:, :, :5]
    alone = run(path, q[:, :, :5], k[:, :, :5], v[:, :, :5], cfg, params)
    torch.testing.assert_close(early, alone)
    assert early.abs().max() > 1
    first = run(path, q[:, :, :1], k[:, :, :1], v[:, :, :1], cfg, params)
    # one key: whatever its weight, it is the answer
    torch.testing.assert_close(first, v[:, :, :1], rtol=1e-4, atol=1e-4)
