"""Reversed attention: messages are conserved, gates by hand, no order of tokens, whose parent is whose."""

import math

import pytest
import torch
from torch.testing import assert_close

from regard.core import Method
from regard.core.call import Call
from regard.kinds.mechanism import make_call
from regard.methods.mechanisms.dense import dependency_vit as page

N, HEADS, WIDTH = 7, 4, 6
OPEN, GATED = page.Config(temperature=None, controller=False), page.Config()
each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])


def drawn(cfg=GATED, groups=2, seed=0, sharp=2.0):
    """q, k, v, x and parameters, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = page.init(cfg, {"heads": HEADS, "width": WIDTH})
    params = {name: sharp * draw(*p.shape) * p.shape[1] ** -0.5 for name, p in params.items()}
    return draw(2, HEADS, N, 3), draw(2, groups, N, 3), draw(2, groups, N, 5), draw(2, N, WIDTH), params


def by_hand(x, params, temperature):
    """(what a token sends, its share by head), in Python's floats."""
    inner = [sum(a * b for a, b in zip(row, x, strict=True)) for row in params["message_in"].tolist()]
    inner = [z / 2 * (1 + math.erf(z / math.sqrt(2))) for z in inner]
    z = sum(a * b for a, b in zip(params["message_out"][0].tolist(), inner, strict=True))
    e = [
        math.exp(sum(a * b for a, b in zip(row, x, strict=True)) / temperature)
        for row in params["selector"].tolist()
    ]
    return 1 / (1 + math.exp(-z)), [share / sum(e) for share in e]


@each_path
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_head_receives_what_the_gates_send_by_it(path, temperature):
    cfg = page.Config(temperature=temperature)
    q, k, v, x, params = drawn(cfg)
    out, state, aux = path(q, k, v, cfg, Call("self", params=params, x=x))
    assert state is None
    wanted = torch.zeros(2, HEADS, 5, dtype=torch.float64)
    for b in range(2):
        for i in range(N):
            sent, shares = by_hand(x[b, i].tolist(), params, temperature)
            assert aux["sent"][b, i].item() == pytest.approx(sent, rel=1e-12)
            for h, share in enumerate(shares):
                wanted[b, h] += sent * share * v[b, h // 2, i]
    assert_close(out.sum(2), wanted)


@each_path
def test_open_gates_lose_and_double_nothing_whoever_receives_it(path):
    q, k, v, _, _ = drawn(groups=4)
    out = path(20 * q, k, v, OPEN, Call("self"))[0]
    assert_close(out.sum(2), v.sum(2))
    # a token that nobody sends anything to is empty, which no row of forward attention is
    assert out.norm(dim=-1).amin() < 1e-6 < v.norm(dim=-1).amin()


@each_path
def test_a_message_is_the_value_beside_the_query(path):
    """Child 1 sends to parent 3, by its query and that one's key, and nothing else moves."""
    n = 4
    k = torch.eye(n, dtype=torch.float64).view(1, 1, n, n)
    q = 1e3 * k[:, :, [0, 3, 2, 2]]
    v = torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64).view(1, 1, n, 1)
    out = path(q, k, v, OPEN, Call("self"))[0]
    assert_close(out.flatten(), torch.tensor([1.0, 0, 1100, 10], dtype=torch.float64))


@each_path
def test_outputs_change_places_with_the_tokens(path):
    q, k, v, x, params = drawn()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    out = path(q, k, v, GATED, Call("self", params=params, x=x))[0]
    mixed = path(*(t[:, :, order] for t in (q, k, v)), GATED, Call("self", params=params, x=x[:, order]))[0]
    assert_close(mixed, out[:, :, order], rtol=1e-12, atol=1e-12)


@each_path
def test_a_hidden_token_neither_sends_nor_receives(path):
    """By head: in head 0 token 2 is hidden, in the others it is there."""
    q, k, v, _, _ = drawn()
    seen = torch.ones(2, HEADS, N, dtype=torch.bool)
    seen[:, 0, 2] = False
    out = path(q, k, v, OPEN, Call("self", key_mask=seen))[0]
    free = path(q, k, v, OPEN, Call("self"))[0]
    rest = [0, 1, 3, 4, 5, 6]
    alone = path(*(t[:, :, rest] for t in (q, k, v)), OPEN, Call("self"))[0]
    assert_close(out[:, 0, rest], alone[:, 0])
    assert not out[:, 0, 2].any()
    assert_close(out[:, 1:], free[:, 1:])


@each_path
def test_what_is_hidden_sends_nothing_and_gives_parameters_no_gradient(path):
    q, k, v, x, params = drawn()
    seen = torch.ones(2, 1, N, dtype=torch.bool)
    seen[0, :, 4:] = False
    x[0, 4:] = torch.nan
    params = {name: p.requires_grad_() for name, p in params.items()}
    out, _, aux = path(q, k, v, GATED, Call("self", key_mask=seen, params=params, x=x))
    assert aux["sent"][0, 4:].tolist() == [0.0] * 3 and (aux["sent"][seen[:, 0]] > 0).all()
    grads = torch.autograd.grad(out.sin().sum(), list(params.values()))
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_gates_of_layers_multiply_where_values_carry_those_before():
    q, k, v, x, params = drawn(groups=4)
    before = torch.rand(2, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    call = Call("self", params=params, x=x)
    out = page.fast(q, k, before[:, None, :, None] * v, GATED, call)[0]
    gates, sent = page.gates_of(q, GATED, call)
    shares = torch.cat([a for _, a in page.spread(q, k, GATED, call)], 2)
    assert_close(gates.sum(1), sent)
    assert_close(out, (shares * (gates * before[:, None])[..., None]).mT @ v)


def test_parents_are_where_most_of_the_message_goes(monkeypatch):
    """Two heads, one parent in each; the selector decides which of them counts. A token of its own is a root."""
    k = torch.eye(4).view(1, 1, 4, 4).expand(1, 2, 4, 4)
    q = 20 * torch.stack([torch.eye(4)[[1, 2, 2, 0]], torch.eye(4)[[3, 3, 3, 3]]])[None]
    cfg = page.Config(temperature=1.0, controller=False)
    params = {"selector": torch.tensor([[0.0], [1.0]])}
    x = torch.tensor([-5.0, -5, -5, 5]).view(1, 4, 1)
    call = Call("self", params=params, x=x)
    assert page.parents(q, k, cfg, call).tolist() == [[1, 2, 2, 3]]
    assert page.parents(q, k, cfg, call.with_(x=-x)).tolist() == [[3, 3, 3, 0]]
    hidden = call.with_(key_mask=torch.tensor([True, True, False, True])[None, None])
    found = page.parents(q, k, cfg, hidden)[0].tolist()
    assert found[0] == 1 and found[2] == -1 and found[3] == 3 and found[1] != 2
    monkeypatch.setattr("regard.ops.softmax.BLOCK", 1)
    assert page.parents(q, k, cfg, call).tolist() == [[1, 2, 2, 3]]


def test_weights_exist_for_a_block_of_children_at_a_time(monkeypatch):
    monkeypatch.setattr("regard.ops.softmax.BLOCK", 2 * HEADS * N * 3)
    q, k, _, x, params = drawn()
    call = Call("self", params=params, x=x)
    sizes = [tuple(a.shape) for _, a in page.spread(q, k, page.Config(), call)]
    assert sizes == [(2, HEADS, 3, N), (2, HEADS, 3, N), (2, HEADS, 1, N)]


def test_settings_that_learn_nothing_take_no_input():
    q, k, v, x, _ = drawn()
    method = Method("dependency_vit", page.METHOD, OPEN)
    assert (
        not page.init(OPEN, {"heads": 2, "width": 3}) and make_call(method, q, k, v, pattern="self").x is None
    )
    with pytest.raises(ValueError, match="mechanisms that read it"):
        make_call(method, q, k, v, pattern="self", x=x)
    with pytest.raises(ValueError, match="temperature > 0"):
        page.Config(temperature=0.0)
