"""Low precision where a law of single pages does not reach: whole layers, scores at the edge of float16, long texts."""

import pytest
import torch

import regard
from regard import catalog
from regard.core import Method, Unsupported
from regard.core.roles import Roles
from regard.kinds.mechanism import Mechanism
from regard.nn import Attention
from regard.ops.machine import products_in
from regard.ops.softmax import masked_softmax, scores
from regard.testing.grids import grid_for

NAMES = [name for name, page in catalog.every() if isinstance(page, Mechanism)]
# of a layer that asks itself; pages for cross alone have layers in tests of their own
OWN = [name for name in NAMES if {"self", "causal_self"} & {*catalog.get(name).patterns}]


@pytest.mark.parametrize("name", ["softmax", "lean_attention"])
@pytest.mark.parametrize("keys", [1, 4])
def test_scores_at_the_edge_of_float16(name, keys):
    """q·k is 80,000 and the score 7,071: all keys alike, so the output is the value."""
    q, k = (torch.full((1, 1, n, 128), 25.0, dtype=torch.float16) for n in (1, keys))
    v = torch.full((1, 1, keys, 128), 2.4, dtype=torch.float16)
    with torch.no_grad():
        out = regard.attend(q, k, v, name).out
    torch.testing.assert_close(out, v[:, :, :1])


def test_scaling_before_the_product_rounds_nothing():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 64, generator=g) for _ in range(2))
    for scale in (100**-0.5, 1.0, 30.0):
        torch.testing.assert_close(scores(q, k, scale), (q @ k.mT) * scale)
        for dtype in (torch.float16, torch.bfloat16):
            with products_in("native"):
                low = scores(q.to(dtype), k.to(dtype), scale)
            late = (q.to(dtype) @ k.to(dtype).mT).float() * scale
            torch.testing.assert_close(low, late, rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_of_scores_of_minus_infinity_is_zero(masked):
    s = torch.zeros(1, 1, 3, 4)
    s[..., 1, :] = -torch.inf
    s.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool) if masked else None
    weights = masked_softmax(s, mask)
    assert not weights[..., 1, :].any()
    torch.testing.assert_close(weights[..., ::2, :], torch.full((1, 1, 2, 4), 0.25))
    weights.square().sum().backward()
    assert s.grad.isfinite().all()


def test_a_half_layer_of_20000_tokens_is_finite():
    """Sums without a denominator pass 65,504 before the norm that follows: they are not cast down in between."""
    torch.manual_seed(0)
    layer = Attention(16, 2, "lightning_attention_2").eval().half()
    x = (torch.randn(1, 20_000, 16) + 3).half()
    with torch.no_grad():
        out = layer(x)[0]
        wanted = layer.float()(x.float())[0]
    assert out.dtype == torch.float16
    assert ((out.float() - wanted).norm() / wanted.norm()).item() < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OWN)
def test_a_layer_learns_under_autocast(name, dtype):
    torch.manual_seed(0)
    page = catalog.get(name)
    cfg = page.config() if page.for_tokens is None else page.for_tokens(page.config(), 9)
    if name == "biformer_bra":
        # which regions are nearest is another question in low precision: all of them
        cfg = page.configure(regions=3, top_k=9)
    method = Method(name, page, cfg)
    try:
        layer = Attention(16, 2, method)
    except Unsupported:
        layer = Attention(16, 2, method, pattern="self")
    x, roles = torch.randn(2, 9, 16), None
    if layer.page.grid is not None:
        roles = Roles.grid(*grid_for(layer.page.grid, layer.method.config, 9))
        x = torch.randn(2, roles.length, 16)
    elif layer.page.roles:
        roles = Roles(**{role: torch.arange(9) % 3 for role in layer.page.roles})
    with torch.autocast("cpu", dtype):
        out = layer(x, roles=roles)[0]
        loss = out.float().square().mean()
    loss.backward()
    wanted = layer(x, roles=roles)[0]
    assert ((out.float() - wanted).norm() / wanted.norm()).item() < 0.05
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["retention", "transnormerllm"])
def test_angles_of_a_long_text(name):
    """Positions of 100,000 turn by an angle that float32 does not hold to three digits."""
    page, g = catalog.get(name), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 100_000, 4, generator=g, dtype=torch.float64) for _ in range(3))
    dims = {"heads": 1, "kv_heads": 1, "key": 4, "value": 4, "width": 4}
    learned = {p: t.detach().double() for p, t in page.init(page.config(), dims).items()} if page.init else {}

    def last(dtype):
        x = v[0].to(dtype) if page.needs_x else None
        params = {p: t.to(dtype) for p, t in learned.items()}
        out = regard.attend(q.to(dtype), k.to(dtype), v.to(dtype), name, params=params, x=x).out
        return out[:, :, -100:].double()

    exact = last(torch.float64)
    error = ((last(torch.float32) - exact).norm() / exact.norm()).item()
    assert error < 2e-5, f"{error:.1e}"
