"""Mixture-of-head attention: gates and balance by hand, ties, heads that are not read."""

import math

import pytest
import torch
from torch.testing import assert_close

from regard.core import Method
from regard.core.call import Call
from regard.kinds.mechanism import make_call
from regard.methods.mechanisms.dense import moh
from regard.ops import softmax_attention


def asked(cfg, *, heads=6, groups=6, n=5, m=5, seed=0, sharp=1.0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = moh.init(cfg, {"heads": heads, "width": 7})
    params = {name: sharp * draw(*p.shape) for name, p in params.items()}
    return draw(2, heads, n, 4), draw(2, groups, m, 4), draw(2, groups, m, 3), draw(2, m, 7), params


def gates_of(x, params, shared, routed, chosen):
    """The equations for one token, in Python's floats."""

    def softmax(name):
        scores = [sum(a * b for a, b in zip(row, x, strict=True)) for row in params[name].tolist()]
        e = [math.exp(s) for s in scores]
        return [value / sum(e) for value in e]

    own, shares, kinds = softmax("shared"), softmax("routed"), softmax("kinds")
    on = sorted(range(routed), key=lambda h: -shares[h])[:chosen]
    total = sum(shares[h] for h in on)
    gates = [2 * kinds[0] * shared * w for w in own]
    gates += [2 * kinds[1] * chosen * shares[h] / total if h in on else 0.0 for h in range(routed)]
    return gates, shares, [float(h in on) for h in range(routed)]


@pytest.mark.parametrize("path", [moh.reference, moh.fast])
def test_gates_and_balance_are_the_equations_and_padding_does_not_count(path):
    cfg = moh.Config(active=0.5, shared=0.34)  # of 6 heads 2 are shared, 1 of 4 is chosen
    assert moh.counts(cfg, 6) == (2, 1)
    q, k, v, x, params = asked(cfg)
    real = torch.tensor([[True] * 5, [False, True, True, True, False]])
    x = x.masked_fill(~real[..., None], 50.0)
    aux = path(q, k, v, cfg, Call("self", key_mask=real[:, None], params=params, x=x))[2]
    shares, on = [], []
    for b, i in real.nonzero().tolist():
        gates, share, chosen = gates_of(x[b, i].tolist(), params, 2, 4, 1)
        assert_close(aux["gates"][b, :, i], torch.tensor(gates, dtype=torch.float64))
        shares.append(share)
        on.append(chosen)
    means = [[sum(column) / len(shares) for column in zip(*rows, strict=True)] for rows in (shares, on)]
    wanted = 4**2 * sum(a * b for a, b in zip(*means, strict=True)) / 4
    assert aux["balance"].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("path", [moh.reference, moh.fast])
def test_equal_scores_choose_the_first_heads_and_give_gates_of_one(path):
    cfg = moh.Config(active=0.5, shared=0.0)
    q, k, v, x, _ = asked(cfg)
    aux = path(q, k, v, cfg, Call(params={"routed": torch.zeros(6, 7)}, x=x))[2]
    assert_close(aux["gates"][0, :, 0], torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    assert aux["balance"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("groups", [4, 8])
def test_a_step_that_reads_only_chosen_heads_gives_the_numbers_of_all(monkeypatch, groups):
    cfg = moh.Config(active=0.25, shared=0.0)
    monkeypatch.setattr("regard.ops.chosen.LONG", 16)
    q, k, v, x, params = asked(cfg, heads=8, groups=groups, n=1, m=40, sharp=5.0)
    q, k, v, x = (t[:1] for t in (q, k, v, x))
    read = []

    def counted(q, *rest, **options):
        read.append(q.shape[1])
        return softmax_attention(q, *rest, **options)

    monkeypatch.setattr("regard.ops.chosen.softmax_attention", counted)
    mask = torch.rand(1, 8, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    for seen in (None, mask[:, :1], mask):
        read.clear()
        call = make_call(Method("moh", moh.METHOD, cfg), q, k, v, params=params, x=x, mask=seen)
        assert_close(moh.fast(q, k, v, cfg, call)[0], moh.reference(q, k, v, cfg, call)[0])
        assert 2 <= sum(read) < 8
