"""The gate: torch's own attention, places as a set, what is closed, the layer around it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import regard
from regard.core import Unsupported
from regard.core.call import Call
from regard.methods.mechanisms.dense import contextual_net_3d as page

C, SIDES, M = 6, (2, 3, 4), 5
N = 24
each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])


def drawn(seed=0, heads=1):
    g = torch.Generator().manual_seed(seed)
    volume = torch.randn(2, C, *SIDES, generator=g, dtype=torch.float64)
    x, text = volume.flatten(2).mT, torch.randn(2, M, C, generator=g, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = page.init(page.Config(), {"heads": heads, "value": C // heads, "width": C})
    params = {n: p.double() for n, p in params.items()}
    params["out_bias"] = torch.randn(heads, C // heads, generator=g, dtype=torch.float64)
    return x, text, params


@each_path
def test_it_is_tanh_of_torch_s_attention_times_the_features_of_a_volume(path):
    x, text, params = drawn()
    there = torch.tensor([[True] * M, [True] * 3 + [False] * 2])
    layer = nn.MultiheadAttention(C, 1, batch_first=True).double()
    with torch.no_grad():
        layer.out_proj.weight.copy_(params["out"][0])
        layer.out_proj.bias.copy_(params["out_bias"][0])
        wanted = x * layer(x, text, text, key_padding_mask=~there)[0].tanh()
        q, k, v = (
            (t @ w.mT + b)[:, None]
            for t, w, b in zip((x, text, text), layer.in_proj_weight.split(C), layer.in_proj_bias.split(C))
        )
        call = Call("cross", there[:, None], params=params, x=(x, text))
        assert_close(path(q, k, v, page.Config(), call)[0][:, 0], wanted)


@each_path
def test_places_are_a_set_and_a_gate_of_zero_closes_them(path):
    x, text, params = drawn()
    q, k = x[:, None], text[:, None]
    out, _, aux = path(q, k, k, page.Config(), Call("cross", params=params, x=(x, text)))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = path(q[:, :, order], k, k, page.Config(), Call("cross", params=params, x=(x[:, order], text)))[0]
    assert_close(moved, out[:, :, order])
    assert_close(out[:, 0], x * aux["gate"][:, 0])
    assert aux["gate"].abs().max() < 1
    closed = params | {"out": 0 * params["out"], "out_bias": 0 * params["out_bias"]}
    assert path(q, k, k, page.Config(), Call("cross", params=closed, x=(x, text)))[0].abs().max() == 0


@each_path
def test_queries_of_zero_give_all_places_one_gate(path):
    x, text, params = drawn()
    k = text[:, None]
    gate = path(0 * x[:, None], k, k, page.Config(), Call("cross", params=params, x=(x, text)))[2]["gate"]
    pooled = (text.mean(1) @ params["out"][0].mT + params["out_bias"][0]).tanh()
    assert_close(gate[:, 0], pooled[:, None].expand(-1, N, -1))


@each_path
def test_heads_gate_channels_of_their_own(path):
    x, text, params = drawn(heads=2)
    q, k = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in (x, text))
    out, _, aux = path(q, k, k, page.Config(), Call("cross", params=params, x=(x, text)))
    assert_close(out, q * aux["gate"])


def test_a_layer_begins_with_the_features_as_they_are():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = regard.nn.Attention(8, 1, "contextual_net_3d", pattern="cross")
        x, text = torch.randn(2, N, 8), torch.randn(2, M, 8)
    layer.o_proj.weight.data = torch.eye(8)
    layer.params.tensors()["out_bias"].data.fill_(50.0)
    assert_close(layer(x, text)[0], x)
    layer(x, text)[0].square().sum().backward()
    with pytest.raises(Unsupported, match="another text"):
        regard.nn.Attention(8, 1, "contextual_net_3d", pattern="self")
    with pytest.raises(ValueError, match="gate is one of"):
        page.Config(gate="softplus")
