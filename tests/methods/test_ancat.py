"""Adaptive non-causal attention: look-ahead over layers, distances over padding, hard gates as a mask."""

import pytest
import torch
from torch.testing import assert_close

from regard.core.call import Call
from regard.methods.mechanisms.dense import ancat
from regard.ops import softmax_attention

N, W = 9, 3


def random_gates(layers, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(2, N, W, generator=g) < 0.3).double() for _ in range(layers)]


def connections(gates):
    """[2, N, N] booleans of one layer: who is read, written frame by frame."""
    reads = torch.zeros(2, N, N, dtype=torch.bool)
    for b in range(2):
        for i in range(N):
            for j in range(N):
                reads[b, i, j] = j <= i or (j - i <= W and bool(gates[b, i, j - i - 1]))
    return reads


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_reach_is_the_farthest_frame_that_any_path_of_the_layers_comes_from(layers):
    gates = random_gates(layers)
    paths = torch.eye(N).expand(2, N, N)
    for layer in gates:
        paths = ((connections(layer).float() @ paths) > 0).float()
    frames = torch.arange(N)
    farthest = torch.where(paths > 0, frames - frames[:, None], -N).amax(-1)
    assert_close(ancat.reach(gates), farthest.double())


def test_reach_of_soft_gates_has_gradients():
    gates = [torch.full((1, N, W), 0.5, requires_grad=True) for _ in range(2)]
    ancat.reach(gates).sum().backward()
    assert all(g.grad.abs().sum() > 0 for g in gates)


def asked(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, 4, generator=g, dtype=torch.float64) for _ in range(3))
    params = {"gate": torch.randn(W, 5, generator=g).double(), "bias": torch.zeros(W).double()}
    return q, k, v, torch.randn(1, n, 5, generator=g, dtype=torch.float64), params


@pytest.mark.parametrize("path", [ancat.reference, ancat.fast])
@pytest.mark.parametrize("hard", [False, True])
def test_padding_between_frames_is_not_counted(path, hard):
    q, k, v, x, params = asked(6)
    cfg = ancat.Config(ahead=W, hard=hard)
    wanted = path(q, k, v, cfg, Call("self", params=params, x=x))[0]
    at = torch.tensor([0, 1, 4, 5, 7, 8])
    real = torch.zeros(1, 1, 9, dtype=torch.bool)
    real[..., at] = True
    wide = [torch.full((*t.shape[:-2], 9, t.shape[-1]), 1e3, dtype=t.dtype) for t in (q, k, v, x)]
    for t, values in zip(wide, (q, k, v, x), strict=True):
        t[..., at, :] = values
    out = path(*wide[:3], cfg, Call("self", key_mask=real, params=params, x=wide[3]))[0]
    assert_close(out[:, :, at], wanted)


@pytest.mark.parametrize("path", [ancat.reference, ancat.fast])
def test_hard_gates_are_softmax_attention_under_their_connections(path):
    q, k, v, x, params = asked(N)
    cfg = ancat.Config(ahead=W, hard=True)
    out, _, aux = path(q, k, v, cfg, Call("self", params=params, x=x))
    wanted = [[[float(row @ frame > 0) for row in params["gate"]] for frame in x[0]]]
    assert aux["gates"].tolist() == wanted
    assert 0 < aux["gates"].mean() < 1
    mask = connections(aux["gates"].expand(2, -1, -1))[:1, None]
    assert_close(out, softmax_attention(q, k, v, scale=0.5, mask=mask))
