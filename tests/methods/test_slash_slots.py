"""Slots: the equations by torch's own layers, sets of slots and places, what the kernel and the points change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import regard
from regard.core import Unsupported
from regard.core.call import Call
from regard.core.roles import Roles
from regard.methods.mechanisms.grid import slash_slots as page

D, SLOTS, SIDES = 8, 3, (4, 5)
M = SIDES[0] * SIDES[1]
BASE, SMOOTH = page.Config(kernel=0), page.Config(kernel=3)
POINTS = page.Config(kernel=3, points=True, iterations=2)
each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])
each_cfg = pytest.mark.parametrize("cfg", [BASE, SMOOTH, POINTS], ids=["base", "kernel", "points"])


def drawn(cfg, heads=1, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = page.init(cfg, {"heads": heads, "key": D})
        params = {n: (p + 0.1 * torch.randn_like(p)).double() for n, p in params.items()}
        for name in (n for n in params if n in ("point_3_bias", "point_4_bias")):
            params[name] += 1.0  # few units, none of them dead
        q, k, v = (torch.randn(2, heads, n, D, dtype=torch.float64) for n in (SLOTS, M, M))
    return q, k, v, Call("cross", params=params, grid=SIDES)


def layers(p, cfg):
    """torch's layers with the weights of head 0."""
    p = {n: t if n == "kernel" else t[0] for n, t in p.items()}
    gru = nn.GRUCell(D, D).double()
    norms = [nn.LayerNorm(D).double() for _ in p["norm"]]
    lines = {n: nn.Linear(*p[n].shape[::-1]).double() for n in p if n in ("up", "down") or n[:-1] == "point_"}
    with torch.no_grad():
        for mine, name in ((gru.weight_ih, "gru_in"), (gru.weight_hh, "gru_state")):
            mine.copy_(p[name].flatten(0, 1))
        gru.bias_ih.copy_(p["gru_in_bias"].flatten())
        gru.bias_hh.copy_(p["gru_state_bias"].flatten())
        for i, layer in enumerate(norms):
            layer.weight.copy_(p["norm"][i])
            layer.bias.copy_(p["norm_bias"][i])
        for name, layer in lines.items():
            layer.weight.copy_(p[name])
            layer.bias.copy_(p[f"{name}_bias"])
    return gru, norms, lines


def by_torch(q, k, v, cfg, call):
    """One head, as the paper's algorithm is written."""
    gru, norms, lines = layers(call.params, cfg)
    slots, k, v, relu = q[:, 0], k[:, 0], v[:, 0], torch.relu
    for _ in range(cfg.iterations):
        before = slots
        logits = k @ (norms[0](slots) @ call.params["query"][0]).mT * D**-0.5  # [B, M, K]
        if cfg.kernel:
            weight = call.params["kernel"]
            weight = (weight / weight.square().sum().sqrt()).flatten().exp()
            weight = (weight / weight.sum()).view(1, 1, cfg.kernel, cfg.kernel)
            maps = logits.mT.reshape(-1, 1, *SIDES)
            logits = F.conv2d(maps, weight, padding=cfg.kernel // 2).view(2, SLOTS, M).mT
        attention = logits.softmax(-1) + cfg.eps
        update = (attention / attention.sum(1, keepdim=True)).mT @ v
        slots = gru(update.flatten(0, 1), before.flatten(0, 1)).view_as(before)
        if cfg.points:
            where = norms[2](slots)
            where = lines["point_2"](relu(lines["point_1"](relu(lines["point_0"](where))))).sigmoid() - 0.5
            slots = slots + lines["point_5"](relu(lines["point_4"](relu(lines["point_3"](where)))))
        slots = slots + lines["down"](relu(lines["up"](norms[1](slots))))
    return slots[:, None], attention.mT[:, None]


@each_path
@each_cfg
def test_it_is_the_algorithm_of_torchs_layers(path, cfg):
    inputs = drawn(cfg)
    wanted, attention = by_torch(*inputs[:3], cfg, inputs[3])
    out, state, aux = path(*inputs[:3], cfg, inputs[3])
    assert state is None
    assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    assert_close(aux["weights"], attention, rtol=1e-9, atol=1e-10)


@each_path
@each_cfg
def test_slots_are_a_set_and_places_are_one_without_the_kernel(path, cfg):
    q, k, v, call = drawn(cfg)
    out = path(q, k, v, cfg, call)[0]
    order = torch.tensor([2, 0, 1])
    assert_close(path(q[:, :, order], k, v, cfg, call)[0], out[:, :, order], rtol=0, atol=1e-12)
    places = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    far = (path(q, k[:, :, places], v[:, :, places], cfg, call)[0] - out).abs().max().item()
    assert far < 1e-12 if cfg.kernel == 0 else far > 1e-3


@each_path
@each_cfg
def test_slots_share_each_place_among_themselves(path, cfg):
    q, k, v, call = drawn(cfg)
    weights = path(q, k, v, cfg, call)[2]["weights"]
    assert_close(weights.sum(2), torch.ones(2, 1, M, dtype=torch.float64), rtol=0, atol=1e-6)


@each_path
def test_a_slot_alone_takes_the_mean_of_all_values(path):
    q, k, v, call = drawn(BASE)
    mean = v.mean(2, keepdim=True).expand_as(v)
    out = path(q[:, :, :1], k, v, BASE, call)[0]
    assert_close(out, path(q[:, :, :1], k, mean, BASE, call)[0], rtol=1e-9, atol=1e-9)


@each_path
def test_the_kernel_keeps_one_place_from_deciding(path):
    """Noise of one place in the scores reaches its neighbours, and itself by a ninth at most or so."""
    cfg = page.Config(kernel=3, iterations=1, eps=0.0)
    q, k, v, call = drawn(cfg)
    call = call.with_(params=call.params | {"kernel": torch.zeros(3, 3, dtype=torch.float64)})
    noisy = k.clone()
    noisy[:, :, 7] *= 9  # of place (1, 2)
    asked = {}
    for name, keys in (("clean", k), ("noisy", noisy)):
        asked[name] = path(q, keys, v, cfg, call)[2]["weights"].log()
    moved = (asked["noisy"] - asked["clean"]).abs().amax((0, 1, 2)).view(SIDES) > 1e-9
    wanted = torch.zeros(SIDES, dtype=torch.bool)
    wanted[0:3, 1:4] = True
    assert torch.equal(moved, wanted)
    bare = page.Config(kernel=0, iterations=1, eps=0.0)
    alone = [path(q, keys, v, bare, call)[2]["weights"].log()[0, 0, 0] for keys in (k, noisy)]
    whole = (alone[1] - alone[0]).view(SIDES)
    assert (whole.abs() > 1e-9).nonzero().tolist() == [[1, 2]]
    # softmax over slots leaves differences of scores as they are
    differences = [w[0, 0, 0] - w[0, 0, 1] for w in (asked["clean"], asked["noisy"])]
    bare_weights = [path(q, keys, v, bare, call)[2]["weights"].log() for keys in (k, noisy)]
    own = [w[0, 0, 0, 7] - w[0, 0, 1, 7] for w in bare_weights]
    assert_close((differences[1] - differences[0])[7], (own[1] - own[0]) / 9)


def test_taps_are_positive_sum_to_one_and_learn():
    kernel = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for by in (0.01, 1.0, 50.0):
        assert_close(page.taps(by * kernel), page.taps(kernel))
    assert (page.taps(kernel) > 0).all() and page.taps(kernel).sum().item() == pytest.approx(1)
    assert page.taps(torch.zeros(3, 3)).flatten().tolist() == pytest.approx([1 / 9] * 9)
    for path in (page.reference, page.fast):
        q, k, v, call = drawn(SMOOTH)
        learned = call.params["kernel"].requires_grad_()
        call.params["query"].requires_grad_()
        path(q, k, v, SMOOTH, call)[0].square().sum().backward()
        assert learned.grad is not None and learned.grad.abs().max() > 1e-6


def test_points_of_slots_lie_in_the_image_and_say_what_the_predictor_says():
    q, k, v, call = drawn(POINTS)
    out = page.fast(q, k, v, POINTS, call)[0]
    _, norms, lines = layers(call.params, POINTS)
    t = norms[2](out[:, 0])
    wanted = lines["point_2"](lines["point_1"](lines["point_0"](t).relu()).relu()).sigmoid() - 0.5
    points = page.points_of(out, call.params)
    assert points.shape == (2, 1, SLOTS, 2) and points.abs().max() < 0.5
    assert_close(points[:, 0], wanted)


def test_a_layer_around_it_refines_given_slots_on_a_grid():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = regard.nn.Attention(8, 1, "slash_slots", pattern="cross")
        slots, features = torch.randn(2, SLOTS, 8), torch.randn(2, M, 8)
    out, state = layer(slots, features, roles=Roles.grid(*SIDES))
    assert out.shape == (2, SLOTS, 8) and state is None
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    with pytest.raises(ValueError, match="a place for each token"):
        layer(slots, features, roles=Roles.grid(4, 4))


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="odd number of places"):
        page.Config(kernel=4)
    q, k, v, call = drawn(BASE)
    for path in (page.reference, page.fast):
        with pytest.raises(Unsupported, match="widths 8 of queries and 6 of values"):
            path(q, k, v[..., :6], BASE, call)
    with pytest.raises(ValueError, match="two axes"):
        page.fits(SMOOTH, (20,))
    page.fits(BASE, (20,))
