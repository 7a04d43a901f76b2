"""What the battery leaves out: flow attention's queries speak to each other, and its causal form is not a prefix."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("flowformer")
PATHS = (PAGE.reference, PAGE.fast)
EPS = 1e-6


def drawn(n: int, m: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, size, d, generator=g).double() for size, d in ((n, 4), (m, 4), (m, 5))]


def cumulative(q, k, v, clamp):
    """The published causal form with every prefix sum, [N, D, E] too, written out."""
    q, k = q.sigmoid(), k.sigmoid()
    t = torch.arange(1, q.shape[2] + 1).double()[:, None]
    incoming = t / ((q + EPS) * (k.cumsum(2) + EPS)).sum(-1, keepdim=True)
    outgoing = t / ((k + EPS) * (q.cumsum(2) + EPS)).sum(-1, keepdim=True)
    sink = ((q + EPS) * ((k * outgoing).cumsum(2) + EPS)).sum(-1, keepdim=True) / t
    source = ((k + EPS) * ((q * incoming).cumsum(2) + EPS)).sum(-1, keepdim=True) / t
    e = (source.clamp(-clamp, clamp) if clamp else source).exp()
    pool = (k[..., None] * (v * e / e.cumsum(2) * t)[..., None, :]).cumsum(2)
    return sink.sigmoid() * torch.einsum("bhnd,bhnde->bhne", q * incoming / t, pool)


@pytest.mark.parametrize("clamp", [1.0, 0.9, None])
def test_causal_self_is_the_published_cumulative_form(clamp):
    qkv = drawn(70, 70)
    for path in PATHS:
        out = path(*qkv, PAGE.configure(clamp=clamp), Call("causal_self"))[0]
        assert_close(out, cumulative(*qkv, clamp), rtol=1e-9, atol=1e-9)


def test_causal_self_begins_as_self_and_then_leaves_it():
    q, k, v = drawn(5, 5)
    for path in PATHS:
        causal = path(q, k, v, PAGE.configure(), Call("causal_self"))[0]
        first = path(q[:, :, :1], k[:, :, :1], v[:, :, :1], PAGE.configure(), Call("self"))[0]
        assert_close(causal[:, :, :1], first)
        assert not torch.allclose(
            causal[:, :, -1], path(q, k, v, PAGE.configure(), Call("self"))[0][:, :, -1]
        )


@pytest.mark.parametrize("pattern", ["self", "cross"])
def test_a_query_moves_its_own_output_and_those_of_others(pattern):
    q, k, v = drawn(6, 6 if pattern == "self" else 9)
    other = q.clone()
    other[:, :, 2] += 1
    for path in PATHS:
        outs = [path(x, k, v, PAGE.configure(clamp=None), Call(pattern))[0] for x in (q, other)]
        assert ((outs[0] - outs[1]).abs().amax((0, 1, 3)) > 1e-9).all()


def test_what_is_settled_stays_when_later_queries_change():
    q, k, v = drawn(9, 9)
    other = q.clone()
    other[:, :, 4] += 1
    for path in PATHS:
        outs = [path(x, k, v, PAGE.configure(clamp=None), Call("causal_self"))[0] for x in (q, other)]
        moved = (outs[0] - outs[1]).abs().amax((0, 1, 3)) > 1e-9
        assert moved.tolist() == [i >= 4 for i in range(9)]


def test_the_kept_outflow_is_one_on_average_in_self():
    q, k, _ = drawn(50, 50)
    q, k = q.sigmoid(), k.sigmoid()
    into = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
    kept_out = (k * (q / into).sum(2, keepdim=True)).sum(-1)
    assert_close(kept_out.mean(-1), torch.ones(2, 3).double())


def test_a_hidden_token_does_not_ask_either():
    q, k, v = drawn(8, 8)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    mask[..., 3] = False
    other = q.clone()
    other[:, :, 3] += 5
    seen = [i for i in range(8) if i != 3]
    for pattern in ("self", "causal_self"):
        for path in PATHS:
            outs = [path(x, k, v, PAGE.configure(), Call(pattern, mask[:, :, 0]))[0] for x in (q, other)]
            assert_close(outs[0][:, :, seen], outs[1][:, :, seen], rtol=0, atol=1e-12)
