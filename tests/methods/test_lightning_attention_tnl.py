"""TNL's layer against the paper's equations, written once more with N x N masks, and a stack of layers that decodes."""

import pytest
import torch
from torch.nn import functional as F

from regard.core.call import Call
from regard.methods.blocks import lightning_attention_tnl as page

WIDTH, HEADS, LAYERS, N = 12, 3, 4, 40
DIMS = {"width": WIDTH, "heads": HEADS}


def params_of(cfg):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.layer)
        return {n: p.double() for n, p in page.init(cfg, DIMS).items()}


def drawn():
    return torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def srms(x):
    return x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)


def paper(x, params, layer):
    """x + GLA(SRMSNorm(x)), then x + SGLU(SRMSNorm(x)), head by head."""
    age, rows = torch.arange(N)[:, None] - torch.arange(N), []
    for h in range(HEADS):
        q, k, v = (srms(x) @ params["qkvu"][:, part, h] for part in range(3))
        scores = F.silu(q)[:, :, None] * F.silu(k)[:, None]  # [B, N, N, D]
        if layer == 0:
            scores = scores * torch.cos(params["theta"][h] * age[..., None])
        decay = torch.exp(torch.tensor(-8 * h / HEADS * (1 - layer / LAYERS)) * age).tril()
        rows.append((scores.sum(-1) * decay.masked_fill(age < 0, 0)) @ v)
    u = srms(x) @ params["qkvu"][:, 3].flatten(1)
    x = x + (srms(torch.cat(rows, dim=-1)) * u) @ params["out"]
    return x + ((srms(x) @ params["vu"][:, 0]) * (srms(x) @ params["vu"][:, 1])) @ params["down"]


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_is_the_paper(layer):
    cfg = page.Config(layer=layer, layers=LAYERS, eps=1e-12)
    x, params = drawn(), params_of(cfg)
    for path in (page.reference, page.fast):
        out, _ = path(x, cfg, Call(params=params))
        torch.testing.assert_close(out, paper(x, params, layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [page.reference, page.fast])
@pytest.mark.parametrize("decay", ["paper", "slopes"])
def test_a_stack_decodes_what_it_reads(decay, path):
    """Four layers, a prompt of 30 tokens and ten more one at a time: the outputs of all at once."""
    x, states = drawn(), [None] * LAYERS

    def stack(x, states):
        after = []
        for layer, state in enumerate(states):
            cfg = page.Config(decay, layer, LAYERS)
            x, state = path(x, cfg, Call(initial_state=state, params=params_of(cfg)))
            after.append(state)
        return x, after

    whole, _ = stack(x, states)
    rows, start = [], 0
    for size in (30, *(1,) * 10):
        out, states = stack(x[:, start : start + size], states)
        rows.append(out)
        start += size
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_weights_are_those_of_a_transformer_layer():
    params = page.init(page.Config(layer=1, layers=2), {"width": 96, "heads": 4})
    assert sum(p.numel() for p in params.values()) == 12 * 96**2
