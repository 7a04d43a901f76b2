"""LAWCAT: the convolution passes hidden tokens over, its tails hold tokens only, and queries it mixes stay causal."""

import pytest
import torch

from regard import catalog
from regard.core import Method
from regard.kinds.mechanism import run
from regard.methods.mechanisms.linear.lawcat import convolved, convolved_at_once

PAGE = catalog.get("lawcat")
PATHS = pytest.mark.parametrize("path", ["reference", "fast"])
SIZES = {"heads": 4, "kv_heads": 2, "key": 4, "value": 4, "width": 6}


def drawn(cfg, n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    x = torch.randn(2, n, 6, generator=g, dtype=torch.float64)
    params = {
        m: p.double() + 0.3 * torch.randn(p.shape, generator=g).double()
        for m, p in PAGE.init(cfg, SIZES).items()
    }
    return q, k, v, x, params


def cut(tensors, rows):
    return [t[..., rows, :] for t in tensors]


def ask(path, qkv, cfg, **call):
    """(out, state)"""
    return run(Method("lawcat", PAGE, cfg), *qkv, impl=path, **call)[:2]


@pytest.mark.parametrize("conv", [convolved, convolved_at_once])
def test_the_convolution_is_that_of_the_tokens_that_are_there(conv):
    g = torch.Generator().manual_seed(0)
    t, taps = torch.randn(2, 3, 9, 4, generator=g), torch.randn(3, 4, 4, generator=g)
    token_mask = torch.rand(2, 1, 9, generator=g) < 0.6
    nothing = torch.zeros(2, 3, 3, 4)
    rows, tail = conv(t, taps, nothing, token_mask)
    for b in range(2):
        tokens = t[b : b + 1][:, :, token_mask[b, 0]]
        wanted, end = conv(tokens, taps, nothing[:1], None)
        assert (rows[b][:, token_mask[b, 0]] - wanted[0]).abs().max() < 1e-5
        assert (tail[b] - end[0]).abs().max() == 0
    padded = torch.nn.functional.pad(t, (0, 0, 3, 0))  # by hand, tap i on the token i before
    by_hand = sum(taps[:, i, None].movedim(1, 1) * padded[:, :, 3 - i : 12 - i] for i in range(4))
    assert (conv(t, taps, nothing, None)[0] - by_hand).abs().max() < 1e-5


@PATHS
def test_hidden_tokens_between_segments_are_passed_over(path):
    cfg = PAGE.config()
    *tensors, params = drawn(cfg)
    q, k, v, x = tensors
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., [0, 4, 5, 6, 11]] = False
    seen = mask[0, 0, 0].nonzero()[:, 0]
    alone = ask(path, cut((q, k, v), seen), cfg, params=params, x=x[:, seen])[0]
    state, parts = None, []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        call = dict(params=params, x=x[:, rows], mask=mask[..., rows], initial_state=state)
        out, state = ask(path, cut((q, k, v), rows), cfg, **call)
        parts.append(out)
    assert (torch.cat(parts, 2)[:, :, seen] - alone).abs().max() < 1e-12


@PATHS
@pytest.mark.parametrize("pattern", ["causal_self", "self", "cross", "causal_cross"])
def test_a_query_moves_itself_and_the_three_after_it_at_most(path, pattern):
    cfg = PAGE.config()
    q, k, v, x, params = drawn(cfg)
    call = dict(params=params, x=(x, x) if "cross" in pattern else x, pattern=pattern)
    base = ask(path, (q, k, v), cfg, **call)[0]
    for j in (0, 5, 11):
        other = q.clone()
        other[:, :, j] += 1
        far = (ask(path, (other, k, v), cfg, **call)[0] - base).abs().amax((0, 1, 3)) > 1e-12
        assert set(far.nonzero()[:, 0].tolist()) <= set(range(j, j + 4))
        assert far[j] or (j == 0 and pattern == "causal_self")


@PATHS
def test_grouped_heads_are_a_copy_for_each(path):
    cfg = PAGE.config()
    q, k, v, x, params = drawn(cfg)
    copied = {n: p if n == "conv_q" else p.repeat_interleave(2, 0) for n, p in params.items()}
    few = ask(path, (q, k, v), cfg, params=params, x=x)[0]
    many = ask(path, (q, *(t.repeat_interleave(2, 1) for t in (k, v))), cfg, params=copied, x=x)[0]
    assert (few - many).abs().max() < 1e-12


def test_left_out_it_is_linear_attention_with_a_map_of_each_side():
    cfg = PAGE.config(kernel=1, gate=False)
    q, k, v, _, params = drawn(cfg)
    phi = [
        torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
        for y in (q @ params["w"].repeat_interleave(2, 0), k @ params["w"])
    ]
    w = (phi[0] @ phi[1].repeat_interleave(2, 1).mT).tril()
    wanted = w / w.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    for path in ("reference", "fast"):
        assert (ask(path, (q, k, v), cfg, params=params)[0] - wanted).abs().max() < 1e-9
    assert set(params) == {"w"}


def one_head_at_a_time(path, cfg, qkv, mask, x, params):
    """Each query head with the KV head that it reads and its own mask, as a text of one head."""
    q, k, v = qkv
    rows = []
    for h in range(4):
        g = h * k.shape[1] // 4
        params_h = {name: p[[h if name in ("conv_q", "gain") else g]] for name, p in params.items()}
        alone = q[:, [h]], k[:, [g]], v[:, [g]]
        rows.append(ask(path, alone, cfg, params=params_h, x=x, mask=mask[:, [h]])[0])
    return torch.cat(rows, dim=1)


@PATHS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"kernel": 1, "normalise": False}])
def test_heads_that_see_keys_of_their_own_are_texts_of_their_own(path, groups, settings):
    """Also where a KV head is shared by all, and carried on without a mask."""
    cfg = PAGE.config(**settings)
    q, k, v, x, params = drawn(cfg)
    k, v = k[:, :groups], v[:, :groups]
    params = {name: p if name in ("conv_q", "gain") else p[:groups] for name, p in params.items()}
    mask = torch.rand(2, 4, 1, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 8:] = True
    wanted = one_head_at_a_time(path, cfg, (q, k, v), mask, x, params)
    out, _ = ask(path, (q, k, v), cfg, params=params, x=x, mask=mask)
    assert (out - wanted).abs().max() < 1e-12
    head, tail = slice(0, 8), slice(8, 12)
    out, state = ask(path, cut((q, k, v), head), cfg, params=params, x=x[:, head], mask=mask[..., head])
    rest, _ = ask(path, cut((q, k, v), tail), cfg, params=params, x=x[:, tail], initial_state=state)
    assert (torch.cat([out, rest], dim=2) - wanted).abs().max() < 1e-12
