"""VSSD: no order of tokens, weights that belong to the token alone, and a skip only where a text asks itself."""

import math

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.mechanisms.linear import vssd as page

CFG = page.Config(chunk=4)
PATHS = [page.reference, page.METHOD.fast]
each_path = pytest.mark.parametrize("path", PATHS, ids=["reference", "fast"])


def drawn(n=9, heads=2, groups=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = draw(2, heads, n, 4), draw(2, groups, n, 4), draw(2, groups, n, 3), draw(2, n, 5)
    params = {"w_dt": draw(5, heads), "dt_bias": draw(heads), "a_log": draw(heads), "d": draw(heads)}
    return *tensors, params


def weights(x, params):
    """softplus(x W + bias) exp(A_log), one for each token and head."""
    return F.softplus(x @ params["w_dt"] + params["dt_bias"]).mT * params["a_log"].exp()[:, None]


@each_path
def test_outputs_permute_with_the_tokens(path):
    q, k, v, x, params = drawn()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    out = path(q, k, v, CFG, Call("self", params=params, x=x))[0]
    mixed = path(*(t[:, :, order] for t in (q, k, v)), CFG, Call("self", params=params, x=x[:, order]))[0]
    torch.testing.assert_close(mixed, out[:, :, order], rtol=1e-12, atol=1e-12)


@each_path
def test_cross_reads_a_memory_without_order_and_without_a_skip(path):
    q, k, v, x, params = drawn()
    call = Call("cross", params=params, x=(x, x))
    out = path(q, k, v, CFG, call)[0]
    wanted = (q @ (weights(x, params)[..., None] * k).mT.contiguous()) @ v
    torch.testing.assert_close(out, wanted.expand_as(out), rtol=1e-10, atol=1e-10)
    flipped = path(q, k.flip(2), v.flip(2), CFG, call.with_(x=(x, x.flip(1))))[0]
    torch.testing.assert_close(flipped, out, rtol=1e-12, atol=1e-12)
    other = path(q, k, v, CFG, call.with_(params=params | {"d": params["d"] + 5}))[0]
    assert torch.equal(other, out)


@each_path
@pytest.mark.parametrize("pattern", ["self", "causal_self"])
def test_a_step_weighs_its_own_token_and_no_other(path, pattern):
    """Where the step of token 3 is three times as large, what every query gets of it is, and nothing else moves."""
    q, k, v, x, params = drawn()
    more = x.clone()
    z = x[:, 3] @ params["w_dt"] + params["dt_bias"]
    # the input that gives three times softplus(z) in both heads
    wanted_z = torch.log(torch.expm1(3 * F.softplus(z)))
    more[:, 3] += (wanted_z - z) @ torch.linalg.pinv(params["w_dt"])
    m = weights(x, params)
    torch.testing.assert_close(weights(more, params)[:, :, 3], 3 * m[:, :, 3])
    base, heavier = (path(q, k, v, CFG, Call(pattern, params=params, x=t))[0] for t in (x, more))
    expected = (q * k[:, :, 3:4]).sum(-1, keepdim=True) * (2 * m[:, :, 3:4, None]) * v[:, :, 3:4]
    if pattern == "causal_self":
        expected[:, :, :3] = 0
    torch.testing.assert_close(heavier - base, expected, rtol=1e-9, atol=1e-9)


@each_path
def test_is_the_weighted_sum_of_keys_and_values(path):
    q, k, v, x, params = drawn(heads=4, groups=2)
    k_h, v_h = (t.repeat_interleave(2, 1) for t in (k, v))
    pairs = (q @ k_h.mT) * weights(x, params)[:, :, None]
    skip = params["d"][:, None, None] * v_h
    for pattern, seen in (("self", pairs), ("causal_self", pairs.tril())):
        out = path(q, k, v, CFG, Call(pattern, params=params, x=x))[0]
        torch.testing.assert_close(out, seen @ v_h + skip, rtol=1e-10, atol=1e-10)


@each_path
def test_two_tokens_by_hand(path):
    """dt = log 2 and log 4, exp(A_log) = 3, values 2 and 5: S = 6 log 2 + 15 log 4, and with D = 1 the own value."""
    one, v = torch.ones(1, 1, 2, 1).double(), torch.tensor([2.0, 5.0]).double().view(1, 1, 2, 1)
    # softplus(log(s - 1)) = log s
    x = torch.tensor([2.0 - 1, 4.0 - 1]).double().log().view(1, 2, 1)
    params = {"w_dt": torch.ones(1, 1), "dt_bias": torch.zeros(1), "d": torch.ones(1)}
    params["a_log"] = torch.tensor([math.log(3)], dtype=torch.float64)
    first, whole = 6 * math.log(2), 6 * math.log(2) + 15 * math.log(4)
    out, state = path(one, one, v, CFG, Call(params=params, x=x))
    assert out.flatten().tolist() == pytest.approx([first + 2, whole + 5], abs=1e-12)
    assert state.item() == pytest.approx(whole, abs=1e-12)
    out, state = path(one, one, v, CFG, Call("self", params=params, x=x))
    assert out.flatten().tolist() == pytest.approx([whole + 2, whole + 5], abs=1e-12) and state is None


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
    q, k, v, x, params = drawn(groups=1)
    mask = torch.ones(2, 2, 9, dtype=torch.bool)
    mask[:, 1, 5] = False
    out = path(q, k, v, CFG, Call("self", key_mask=mask, params=params, x=x))[0]
    free = path(q, k, v, CFG, Call("self", params=params, x=x))[0]
    torch.testing.assert_close(out[:, 0], free[:, 0])
    rest = [i for i in range(9) if i != 5]
    pairs = (q[:, 1] @ k[:, 0].mT * weights(x, params)[:, 1, None])[:, :, rest]
    torch.testing.assert_close(out[:, 1, 5], (pairs @ v[:, 0, rest])[:, 5])
