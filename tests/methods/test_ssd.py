"""State space duality: the recurrence and the attention of the same numbers, steps that skip or forget, the skip."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.mechanisms.linear import ssd as page

CFG = page.Config(chunk=4)
PATHS = [page.reference, page.METHOD.fast]
each_path = pytest.mark.parametrize("path", PATHS, ids=["reference", "fast"])


def drawn(n=11, heads=2, groups=1, seed=0):
    """q, k, v, x and params with steps of about 0.7, so that a few tokens are enough to forget."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = draw(2, heads, n, 4), draw(2, groups, n, 4), draw(2, groups, n, 3), draw(2, n, 5)
    params = {"w_dt": draw(5, heads), "dt_bias": draw(heads), "a_log": draw(heads) / 2, "d": draw(heads)}
    return *tensors, params


def steps(x, params):
    return F.softplus(x @ params["w_dt"] + params["dt_bias"]).mT


def attention(q, k, v, x, params, sees):
    """Weights q_t·k_s dt_s e^{A (sum of the steps between s and t)}: the dual form, pair by pair, and the skip."""
    dt, a = steps(x, params), -params["a_log"].exp()
    n = q.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for t in range(n):
        for s in range(n):
            if not sees(s, t):
                continue
            between = dt[:, :, s + 1 : t + 1] if s <= t else dt[:, :, t:s]
            weight = (q[:, :, t] * k[:, :, s]).sum(-1) * dt[:, :, s] * (a * between.sum(-1)).exp()
            out[:, :, t] += weight[..., None] * v[:, :, s]
    return out + params["d"][:, None, None] * v


@each_path
def test_the_recurrence_is_the_attention_of_the_dual_form(path):
    q, k, v, x, params = drawn()
    wanted = attention(q, k, v, x, params, lambda s, t: s <= t)
    out, _ = path(q, k, v, CFG, Call(params=params, x=x))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


@each_path
def test_self_weighs_by_the_steps_on_both_sides(path):
    q, k, v, x, params = drawn()
    wanted = attention(q, k, v, x, params, lambda s, t: True)
    out, _ = path(q, k, v, CFG, Call("self", params=params, x=x))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


@each_path
def test_two_tokens_by_hand(path):
    """dt = log 2 and log 4, A = -1, D = 3: y = (2 log 2 + 6, (2 log 2) / 4 + 5 log 4 + 15) for values 2 and 5."""
    one, v = torch.ones(1, 1, 2, 1).double(), torch.tensor([2.0, 5.0]).double().view(1, 1, 2, 1)
    # softplus(log(s - 1)) = log s
    x = torch.tensor([2.0 - 1, 4.0 - 1]).double().log().view(1, 2, 1)
    params = {
        "w_dt": torch.ones(1, 1),
        "dt_bias": torch.zeros(1),
        "a_log": torch.zeros(1),
        "d": 3 * torch.ones(1),
    }
    out, state = path(one, one, v, CFG, Call(params=params, x=x))
    end = 2 * math.log(2) / 4 + 5 * math.log(4)
    assert out.flatten().tolist() == pytest.approx([2 * math.log(2) + 6, end + 15], abs=1e-12)
    assert state.item() == pytest.approx(end, abs=1e-12)


@each_path
@pytest.mark.parametrize("pattern", ["self", "causal_self", "cross"])
def test_a_token_without_a_step_is_skipped(path, pattern):
    """It neither writes nor forgets: the others get what they get without it."""
    q, k, v, x, params = drawn()
    params["w_dt"][0], x[..., 0] = -1.0, 0.0
    x[:, 4, 0] = 1e4
    rest = [i for i in range(11) if i != 4]
    inputs = (x, x) if pattern == "cross" else x
    out, state = path(q, k, v, CFG, Call(pattern, params=params, x=inputs))
    fewer = (x, x[:, rest]) if pattern == "cross" else x[:, rest]
    few = [q if pattern == "cross" else q[:, :, rest], k[:, :, rest], v[:, :, rest]]
    wanted, end = path(*few, CFG, Call(pattern, params=params, x=fewer))
    out = out if pattern == "cross" else out[:, :, rest]
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    if pattern == "causal_self":
        torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@each_path
def test_a_large_step_forgets_all_that_came_before(path):
    q, k, v, x, params = drawn()
    params["w_dt"][0], x[..., 0] = 1.0, 0.0
    x[:, 6, 0] = 1e3
    out, _ = path(q, k, v, CFG, Call(params=params, x=x))
    later = path(*(t[:, :, 6:] for t in (q, k, v)), CFG, Call(params=params, x=x[:, 6:]))[0]
    torch.testing.assert_close(out[:, :, 6:], later, rtol=1e-9, atol=1e-9)


@each_path
def test_the_skip_passes_each_token_its_own_value(path):
    """D·v and no more: the outputs move by D times the own value where a text asks itself, not at all in cross."""
    q, k, v, x, params = drawn(heads=2, groups=2)
    less = params | {"d": torch.zeros(2)}
    for pattern in ("self", "causal_self"):
        both = [path(q, k, v, CFG, Call(pattern, params=p, x=x))[0] for p in (params, less)]
        torch.testing.assert_close(both[0] - both[1], params["d"][:, None, None] * v, rtol=1e-9, atol=1e-9)
    for pattern in ("cross", "causal_cross"):
        both = [path(q, k, v, CFG, Call(pattern, params=p, x=(x, x)))[0] for p in (params, less)]
        assert torch.equal(*both)


@each_path
def test_fewer_queries_than_keys_are_the_last_rows_of_the_whole(path):
    q, k, v, x, params = drawn()
    call = Call(params=params, x=x)
    whole, end = path(q, k, v, CFG, call)
    out, state = path(q[:, :, 4:], k, v, CFG, call)
    torch.testing.assert_close(out, whole[:, :, 4:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@each_path
def test_a_mask_of_one_head_hides_the_skip_of_that_head_only(path):
    """One KV head, two query heads, a token hidden from the second: the first still passes it on to itself."""
    q, k, v, x, params = drawn(groups=1)
    mask = torch.ones(2, 2, 11, dtype=torch.bool)
    mask[:, 1, 5] = False
    out = path(q, k, v, CFG, Call(key_mask=mask, params=params, x=x))[0]
    free = path(q, k, v, CFG, Call(params=params, x=x))[0]
    torch.testing.assert_close(out[:, 0], free[:, 0])
    without = path(q, k, v, CFG, Call(key_mask=mask, params=params | {"d": torch.zeros(2)}, x=x))[0]
    torch.testing.assert_close(out[:, 1, 5], without[:, 1, 5])


def test_a_fresh_layer_has_steps_and_rates_in_the_ranges_of_its_settings():
    cfg = page.Config(dt_min=0.01, dt_max=0.02, a_min=2.0, a_max=3.0)
    params = page.init(cfg, {"heads": 512, "width": 4})
    dt, a = F.softplus(params["dt_bias"]), params["a_log"].exp()
    for values, low, high in ((dt, 0.01, 0.02), (a, 2.0, 3.0)):
        assert low * 0.999 <= values.min() <= low * 1.05 and high * 0.95 <= values.max() <= high * 1.001
    assert torch.equal(params["d"], torch.ones(512))
