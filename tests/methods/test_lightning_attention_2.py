"""Lightning Attention-2: decays against ALiBi's slopes, and the sum over pairs that its blocks stand for."""

import pytest
import torch

from regard.core.call import Call
from regard.methods.blocks import lightning_attention_tnl
from regard.methods.mechanisms.linear import lightning_attention_2, transnormerllm
from regard.ops.lightning import layer_decay

PATHS = (lightning_attention_2.METHOD.reference, lightning_attention_2.METHOD.fast)


def alibi(n):
    """2^(-8/n), 2^(-16/n), .. for a power of two n; of others the power below, then every second one of the next."""
    if n & (n - 1) == 0:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    below = 1 << (n.bit_length() - 1)
    return alibi(below) + alibi(2 * below)[0::2][: n - below]


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_slopes_are_those_of_alibi(heads):
    q = torch.empty(1, heads, 1, 1, dtype=torch.float64)
    for layer, factor in ((0, 1 + 1e-5), (1, 0.5 + 1e-5), (2, 1e-5)):
        wanted = -torch.tensor(alibi(heads), dtype=torch.float64) * factor
        torch.testing.assert_close(layer_decay(q, "slopes", layer, 3), wanted)
        for page in (lightning_attention_2, transnormerllm, lightning_attention_tnl):
            cfg = page.Config(decay="slopes", layer=layer, layers=3)
            lam = torch.tensor([page.decay_of(h, heads, cfg) for h in range(heads)], dtype=torch.float64)
            torch.testing.assert_close(lam.log(), wanted)


def test_heads_fade_as_the_paper_says():
    """λ_h = exp(-8h/H · (1 - l/L)): what a value of one token leaves t tokens later."""
    one = torch.ones(1, 4, 6, 1, dtype=torch.float64)
    v = torch.zeros_like(one)
    v[:, :, 0] = 1
    h, t = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(6)
    for layer in (0, 1, 2):
        wanted = torch.exp(-8 * h / 4 * (1 - layer / 3) * t)
        for path in PATHS:
            out, _ = path(one, one, v, lightning_attention_2.Config(layer=layer, layers=3), Call())
            torch.testing.assert_close(out[0, :, :, 0], wanted)


def test_a_long_text_does_not_overflow():
    """λ⁻ᵗ of the last head is infinite after some hundred tokens; differences of exponents are not."""
    cfg = lightning_attention_2.Config(layers=1, chunk=256)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 600, 4, generator=g) for _ in range(3))
    out, wanted = (path(q, k, v, cfg, Call())[0] for path in reversed(PATHS))
    assert out.isfinite().all()
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
