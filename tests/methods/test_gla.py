"""Gated linear attention: the gates that its inputs set, and the recurrence as it is written."""

import torch

from regard.core.call import Call
from regard.methods.mechanisms.linear import gla as page

PATHS = (page.METHOD.reference, page.METHOD.fast)


def drawn(n, heads=2, groups=1, d=4, e=3, c=5):
    g = torch.Generator().manual_seed(n)
    shapes = ((2, heads, n, d), (2, groups, n, d), (2, groups, n, e), (2, n, c))
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]


def params_of(cfg, groups=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = page.init(cfg, {"heads": 2, "kv_heads": groups, "key": 4, "value": 3, "width": 5})
    return {n: p.double() + 0.3 for n, p in params.items()}


def test_is_the_recurrence_with_grouped_heads():
    """Two query heads read one KV head, whose gates fall on the state's rows before the new key is added."""
    cfg = page.Config(rank=2, tau=2.0)
    (q, k, v, x), params = drawn(11), params_of(cfg)
    z = (x @ params["down"]) @ params["up"][:, 0] + params["bias"][0]
    alpha = torch.sigmoid(z) ** (1 / cfg.tau)  # [B, N, D]
    state, rows = torch.zeros(2, 4, 3, dtype=torch.float64), []
    for t in range(11):
        state = alpha[:, t, :, None] * state + k[:, 0, t, :, None] * v[:, 0, t, None]
        rows.append(q[:, :, t] @ state)
    wanted = torch.stack(rows, dim=2)
    for path in PATHS:
        out, end = path(q, k, v, cfg, Call(params=params, x=x))
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(end, state[:, None].expand(-1, 2, -1, -1), rtol=1e-9, atol=1e-9)


def test_each_channel_forgets_at_its_own_rate():
    cfg, (q, k, v, x) = page.Config(rank=2, tau=1.0), drawn(2)
    params = {n: torch.zeros_like(p) for n, p in params_of(cfg).items()}
    params["bias"][0] = torch.tensor([40.0, 0.0, -40.0, 40.0])  # keeps, halves, forgets, keeps
    rates = torch.tensor([1.0, 0.5, 0.0, 1.0], dtype=torch.float64)[:, None]
    for path in PATHS:
        _, before = path(q[:, :, :1], k[:, :, :1], v[:, :, :1], cfg, Call(params=params, x=x[:, :1]))
        call = Call(params=params, x=x[:, 1:], initial_state=before)
        _, after = path(q[:, :, 1:], 0 * k[:, :, 1:], v[:, :, 1:], cfg, call)
        torch.testing.assert_close(after, before * rates, rtol=1e-9, atol=1e-9)


def test_larger_tau_forgets_more_slowly():
    q, k, v, x = drawn(30)
    params = params_of(page.Config())
    first = [
        page.METHOD.fast(q, k, v, page.Config(tau=tau), Call(params=params, x=x))[1]
        for tau in (1.0, 16.0, 1e12)
    ]
    plain = (k.mT @ v).expand(-1, 2, -1, -1)
    off = [(state - plain).norm().item() for state in first]
    assert off[0] > off[1] > off[2] and off[2] < 1e-6
