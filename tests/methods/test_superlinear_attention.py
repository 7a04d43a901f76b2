"""Superlinear attention in many pieces, what it says it read, and how its routing learns."""

import pytest
import torch
from torch.testing import assert_close

from regard.core.call import Call
from regard.methods.mechanisms.sparse import superlinear_attention as page
from regard.ops import explicit
from regard.ops.blocks import latest_keys, placed


def inputs(n: int, heads: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, heads, n, 4, generator=g, dtype=torch.float64) for _ in "qkv")
    route = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(
        heads, 4, 4, generator=g, dtype=torch.float64
    )
    return [t.requires_grad_() for t in (q, k, v, route)]


@pytest.mark.parametrize("options", [{}, *page.METHOD.test_settings, {"dense_last": 7, "window_index": 1}])
def test_a_few_queries_at_a_time(monkeypatch, options) -> None:
    monkeypatch.setattr(page, "GATHERED", 4_000)
    results = []
    for path in (page.METHOD.fast, page.METHOD.reference):
        q, k, v, route = tensors = inputs(150)
        out = path(q, k, v, page.Config(**options), Call(params={"route": route}))[0]
        results.append((out, torch.autograd.grad(out.cos().sum(), tensors)))
    assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_mixture_of_what_it_says_it_read() -> None:
    q, k, v, route = (t.detach() for t in inputs(100))
    cfg = page.Config(top_k=2, window_index=2)
    out, _, aux = page.METHOD.fast(q, k, v, cfg, Call(params={"route": route}))
    first, last = aux["spans"]
    for b, h, i in ((0, 0, 99), (1, 1, 57), (0, 1, 8)):
        branches, scores = [], []
        for a, z in zip(first[b, h, i].tolist(), last[b, h, i].tolist(), strict=True):
            if a < 0:
                continue
            read = [*range(a, z + 1), *range(i - 7, i + 1)]
            branches.append((k[b, h, read] @ q[b, h, i] / 2).softmax(0) @ v[b, h, read])
            scores.append((route[h] @ q[b, h, i]) @ k[b, h, z])  # without `ahead` the anchor is the last
        gate = torch.stack(scores).softmax(0)
        assert_close(out[b, h, i], gate @ torch.stack(branches))
        assert len(branches) == min(2, len(page.distances(i + 1, cfg)))


def test_one_span_leaves_the_routing_nothing_to_learn() -> None:
    norms = []
    for top_k in (1, 2):
        q, k, v, route = inputs(40)
        out = page.METHOD.fast(
            q, k, v, page.Config(top_k=top_k, window_index=0), Call(params={"route": route})
        )[0]
        norms.append(torch.autograd.grad(out.square().sum(), route)[0].norm().item())
    assert norms[0] < 1e-12 and norms[1] > 0.1


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 18, 60, 2**40])
@pytest.mark.parametrize("queries", [61, 20, 1])
def test_latest_keys_are_a_sliding_window(width, queries) -> None:
    q, k, v, _ = (t.detach() for t in inputs(61))
    q, far = q[:, :, -queries:], torch.arange(61 - queries, 61)[:, None] - torch.arange(61)
    at = placed(q, k, v, Call(), 8)
    out, lse = (at.back(t) for t in latest_keys(at, 8, width))
    mask = (far >= 0) & (far < width)
    assert_close(out, explicit(q, k, v, scale=0.5, mask=mask))
    assert_close(lse, (q @ k.mT / 2).masked_fill(~mask, -torch.inf).logsumexp(-1))
