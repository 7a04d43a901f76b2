"""LightNet's fast path has two routes, without gates and with them; the battery's keys take the first."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core import Method
from regard.kinds.mechanism import run

PAGE = catalog.get("lightnet")
MODULE = PAGE.form.__globals__


def ask(path, qkv, **call):
    """(out, state)"""
    return run(Method("lightnet", PAGE, PAGE.config()), *qkv, impl=path, **call)[:2]


def gradients(path, qkv, mask, state):
    qkv = [t.detach().clone().requires_grad_() for t in qkv]
    out, end = ask(path, qkv, mask=mask, initial_state=state)
    total = out.cos().sum() + sum(t.sin().sum() for t in end)
    return [out, *end, *torch.autograd.grad(total, qkv)]


def drawn(n: int, wide: float, seed: int):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, d, generator=g).double() for d in (4, 4, 5))
    return q, wide * k, v


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("wide", [0.5, 8.0, 100.0])
def test_both_routes_are_the_recurrence(wide, hidden, monkeypatch):
    state = ask("reference", drawn(9, wide, 1))[1]
    mask = torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(2)) < 0.6 if hidden else None
    qkv = drawn(70, wide, 0)
    for begun in (None, state):
        wanted = gradients("reference", qkv, mask, begun)
        assert_close(gradients("fast", qkv, mask, begun), wanted, rtol=1e-9, atol=1e-9)
        monkeypatch.setitem(MODULE, "apart", lambda *_: True)
        assert_close(gradients("fast", qkv, mask, begun), wanted, rtol=1e-9, atol=1e-9)
        monkeypatch.undo()


def test_equal_keys_are_a_running_mean():
    q, k, v = drawn(6, 0.0, 0)
    for path in ("reference", "fast"):
        out = ask(path, (q, k, v))[0]
        means = v.cumsum(2) / torch.arange(1, 7)[:, None]
        assert_close(out, torch.nn.functional.silu(q).sum(-1, keepdim=True) * means)


def test_the_order_of_the_tokens_is_unknown_without_causality():
    q, k, v = drawn(30, 1.0, 0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for path in ("reference", "fast"):
        out = ask(path, (q, k, v), pattern="self")[0]
        moved = ask(path, [t[:, :, order] for t in (q, k, v)], pattern="self")[0]
        assert_close(moved, out[:, :, order])
