"""Hedgehog: grouped heads, the two forms of the map, and what transfer does to the weights."""

import pytest
import torch

import regard
from regard import catalog
from regard.core.call import Call

METHOD = catalog.get("hedgehog")


def drawn(heads=4, groups=2, n=12, d=4):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d, generator=g, dtype=torch.float64) for h in (heads, groups, groups))
    dims = {"heads": heads, "kv_heads": groups, "key": d, "value": d, "width": 8}
    params = METHOD.init(METHOD.config(), dims)
    return (
        q,
        k,
        v,
        {n: p.double() + 0.3 * torch.randn(p.shape, generator=g).double() for n, p in params.items()},
    )


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_grouped_heads_are_a_copy_for_each(path):
    run = getattr(METHOD, path)
    q, k, v, params = drawn()
    copied = {"w_q": params["w_q"], "w_k": params["w_k"].repeat_interleave(2, 0)}
    few, state = run(q, k, v, METHOD.config(), Call(params=params))
    many, wide = run(q, *(t.repeat_interleave(2, 1) for t in (k, v)), METHOD.config(), Call(params=copied))
    assert (few - many).abs().max() < 1e-12
    assert state.shape[1] == 2 and (state - wide[:, ::2]).abs().max() < 1e-12


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_a_mask_that_differs_by_head_keeps_a_state_for_each(path):
    run = getattr(METHOD, path)
    q, k, v, params = drawn()
    mask = torch.ones(2, 4, 12, dtype=torch.bool)
    mask[:, 1, 3] = False
    whole, end = run(q, k, v, METHOD.config(), Call(key_mask=mask, params=params))
    assert end.shape[1] == 4
    out, state = segments(run, (q, k, v), params, mask, (slice(0, 7), slice(7, 12)))
    assert (out - whole).abs().max() < 1e-12 and (state - end).abs().max() < 1e-12


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_a_state_for_each_head_stays_one_when_the_mask_ends(path):
    """What one query head was not shown stays hidden from it, in segments that hide nothing more."""
    run = getattr(METHOD, path)
    q, k, v, params = drawn()
    mask = torch.ones(2, 4, 12, dtype=torch.bool)
    mask[:, 1, 3] = False
    whole, end = run(q, k, v, METHOD.config(), Call(key_mask=mask, params=params))
    out, state = segments(run, (q, k, v), params, mask, (slice(0, 5), slice(5, 8), slice(8, 12)), masked=1)
    assert (out - whole).abs().max() < 1e-12 and (state - end).abs().max() < 1e-12


def segments(run, tensors, params, mask, cuts, masked=99):
    """(out, last state) of segments; the mask is given to the first `masked` of them."""
    state, parts = None, []
    for i, cut in enumerate(cuts):
        key_mask = mask[..., cut] if i < masked else None
        call = Call(key_mask=key_mask, initial_state=state, params=params)
        out, state = run(*(t[:, :, cut] for t in tensors), METHOD.config(), call)
        parts.append(out)
    return torch.cat(parts, 2), state


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize(("feature", "limit"), [("softmax", 0.5), ("exp", 20.0), ("exp", 0.5)])
def test_is_the_weighted_mean_of_its_features(path, feature, limit):
    """Oracle: all weights φ(q)·φ(k) at once, features written as the softmax or exponential of (xW, -xW)."""
    q, k, v, params = drawn()
    y_q, y_k = q @ params["w_q"], (k @ params["w_k"]).repeat_interleave(2, 1)
    y_k = y_k if feature == "softmax" else y_k.clamp(-limit, limit)
    phi = [torch.cat([y, -y], -1) for y in (y_q, y_k)]
    phi = [y.softmax(-1) if feature == "softmax" else y.exp() for y in phi]
    weights = (phi[0] @ phi[1].mT).tril()
    wanted = weights @ v.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True)
    out = getattr(METHOD, path)(q, k, v, METHOD.config(feature=feature, limit=limit), Call(params=params))[0]
    assert (out - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_fewer_queries_than_keys_are_the_last_rows_of_the_whole(path):
    run = getattr(METHOD, path)
    q, k, v, params = drawn()
    whole, end = run(q, k, v, METHOD.config(), Call(params=params))
    out, state = run(q[:, :, 5:], k, v, METHOD.config(), Call(params=params))
    assert (out - whole[:, :, 5:]).abs().max() < 1e-12 and (state - end).abs().max() < 1e-12


def test_the_two_forms_differ_by_the_sums_of_the_keys():
    q, k, _, params = drawn()
    y = k @ params["w_k"]
    sums = torch.cat([y, -y], -1).exp().sum(-1)  # what the softmax form divides a key's features by
    eye = torch.eye(12).double().expand(2, 2, 12, 12)
    exp = METHOD.fast(q, k, eye, METHOD.config(feature="exp"), Call(params=params))[0]
    wanted = exp / sums.repeat_interleave(2, 1)[:, :, None]
    soft = METHOD.fast(q, k, eye, METHOD.config(), Call(params=params))[0]
    assert (soft - wanted / wanted.sum(-1, keepdim=True)).abs().max() < 1e-9


def test_params_are_asked_for():
    q, k, v, _ = drawn()
    with pytest.raises(ValueError, match="params holds w_q, w_k"):
        regard.attend(q, k, v, "hedgehog")
