"""TransNormerLLM: the parallel form as the paper writes it, and where its numbers would overflow."""

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.mechanisms.linear import transnormerllm

H, D, E, C = 3, 4, 2, 5
PATHS = (transnormerllm.METHOD.reference, transnormerllm.METHOD.fast)


def drawn(n):
    g = torch.Generator().manual_seed(n)
    shapes = ((2, H, n, D), (2, H, n, D), (2, H, n, E), (2, n, C))
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]


def params_of(cfg):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = transnormerllm.init(cfg, {"heads": H, "kv_heads": H, "key": D, "value": E, "width": C})
    return {n: p.double() for n, p in params.items()}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("pattern", ["causal_self", "self"])
def test_is_the_parallel_form(layer, pattern):
    cfg = transnormerllm.Config(layer=layer, layers=3)
    (q, k, v, x), params = drawn(21), params_of(cfg)
    age = torch.arange(21)[:, None] - torch.arange(21)
    decay = torch.exp(-8 * torch.arange(H)[:, None, None] / H * (1 - layer / 3) * age.abs())  # [H, N, M]
    scores = torch.einsum("bhnd,bhmd->bhnmd", F.silu(q), F.silu(k))
    if layer == 0:
        scores = scores * torch.cos(params["theta"][:, None, None] * age[..., None])
    scores = scores.sum(-1) * decay
    o = ((scores.tril() if pattern == "causal_self" else scores) @ v).transpose(1, 2).flatten(2)
    o = o * (H * E) ** 0.5 / o.norm(dim=-1, keepdim=True) * (x @ params["gate"].flatten(1))
    wanted = o.unflatten(-1, (H, E)).transpose(1, 2)
    for path in PATHS:
        out, _ = path(q, k, v, cfg, Call(pattern, params=params, x=x))
        # the page's eps stands beside the mean square
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_a_state_does_not_count_its_tokens():
    cfg = transnormerllm.Config()
    (q, k, v, x), params = drawn(50), params_of(cfg)
    for path in PATHS:
        state, (whole, _) = None, path(q, k, v, cfg, Call(params=params, x=x))
        for cut in (slice(0, 17), slice(17, 18), slice(18, 50)):
            part = (t[:, :, cut] for t in (q, k, v))
            out, state = path(*part, cfg, Call(initial_state=state, params=params, x=x[:, cut]))
            torch.testing.assert_close(out, whole[:, :, cut], rtol=1e-9, atol=1e-9)


def test_last_queries_read_the_last_inputs():
    """Fewer queries than keys: the gate is that of the last tokens, where the queries stand."""
    cfg = transnormerllm.Config()
    (q, k, v, x), params = drawn(9), params_of(cfg)
    for path in PATHS:
        whole, _ = path(q, k, v, cfg, Call(params=params, x=x))
        for n in (1, 4):
            out, _ = path(q[:, :, -n:], k, v, cfg, Call(params=params, x=x))
            torch.testing.assert_close(out, whole[:, :, -n:], rtol=1e-9, atol=1e-9)


def test_only_the_first_layer_rotates():
    dims = {"heads": H, "kv_heads": H, "key": D, "value": E, "width": C}
    assert "theta" in params_of(transnormerllm.Config(layer=0, layers=2))
    assert "theta" not in params_of(transnormerllm.Config(layer=1, layers=2))
    for layer, parts in ((0, 2), (1, 1)):
        cfg = transnormerllm.Config(layer=layer, layers=2)
        assert transnormerllm.METHOD.state_size(cfg, dims, 9) == parts * H * D * E
