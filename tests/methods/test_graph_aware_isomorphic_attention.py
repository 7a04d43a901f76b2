"""GIN attention: torch's own layers, token by token; what ε does; a token of its own beside the mean."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard import attend
from regard.catalog import method
from regard.core import Unsupported

NAME, HEADS, WIDTH = "graph_aware_isomorphic_attention", 2, 4


def tokens(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, n, WIDTH, generator=g, dtype=torch.float64) for _ in range(3)]


def learned(**settings):
    page = method(NAME).page
    torch.manual_seed(0)
    dims = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": 8}
    params = page.init(page.config(**settings), dims)
    return {name: (p + 0.1 * torch.randn_like(p)).double() for name, p in params.items()}


def test_against_torchs_layers():
    """The released code's order: linear, RMS norm, SiLU, linear, head by head; with 1 + ε as the paper has it."""
    (q, k, v), p = tokens(), learned()
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    heads = []
    for h in range(HEADS):
        up, down = nn.Linear(WIDTH, 2 * WIDTH).double(), nn.Linear(2 * WIDTH, WIDTH).double()
        norm = nn.RMSNorm(2 * WIDTH, eps=1e-6).double()
        up.weight.data, up.bias.data = p["w_1"][h], p["b_1"][h]
        down.weight.data, down.bias.data, norm.weight.data = p["w_2"][h], p["b_2"][h], p["norm"][h]
        mlp = nn.Sequential(up, norm, nn.SiLU(), down)
        heads.append(mlp((1 + p["eps"][h]) * v[:, h] + found[:, h]))
    for impl in ("reference", "fast"):
        out = attend(q, k, v, NAME, params=p, impl=impl).out
        torch.testing.assert_close(out, torch.stack(heads, dim=1))


def test_eps_alone_reads_the_token_itself():
    q, k, v = tokens()
    softmax = attend(q, k, v, "softmax").out
    for eps in (-1.0, 0.0, 0.5):
        out = attend(q, k, v, NAME, eps=eps, expand=0).out
        torch.testing.assert_close(out, softmax + (1 + eps) * v)


def test_the_last_queries_have_the_last_values():
    (q, k, v), p = tokens(), learned()
    whole = attend(q, k, v, NAME, params=p).out
    torch.testing.assert_close(attend(q[:, :, 4:], k, v, NAME, params=p).out, whole[:, :, 4:])


def test_a_query_that_sees_nothing_has_no_output_of_its_own_either():
    """The MLP's bias and its own value are left out too."""
    (q, k, v), p = tokens(), learned()
    seen = torch.ones(7, 7, dtype=torch.bool)
    seen[3] = False
    for impl in ("reference", "fast"):
        out = attend(q, k, v, NAME, params=p, mask=seen, impl=impl).out
        assert not out[:, :, 3].any()
        assert out[:, :, [2, 4]].all()


def test_cross_has_no_value_of_its_own():
    q, k, v = tokens()
    with pytest.raises(Unsupported, match="no value of its own"):
        attend(q, k, v, NAME, "cross", params=learned())
