"""Retention against its definition in complex numbers, in which the rotation is one factor e^{iθ}."""

import pytest
import torch

from regard.core.call import Call
from regard.methods.mechanisms.linear import retention as page

PATHS = (page.METHOD.reference, page.METHOD.fast)


def complex_form(q, k, v, slowest=10000.0):
    """o_t = Re Σ_s (γ e^{iθ})^(t-s) q_t conj(k_s) v_s / √D, channels 2c and 2c + 1 as one complex number."""
    n, d, heads = q.shape[2], q.shape[3], q.shape[1]
    a, b = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    age = torch.arange(n)[:, None] - torch.arange(n)
    theta = slowest ** -(torch.arange(d // 2).double() / (d // 2 - 1))
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads).double())
    rotation = torch.exp(1j * age[..., None] * theta)  # [N, M, D/2]
    weights = torch.einsum("bhnc,bhmc,nmc->bhnm", a, b.conj(), rotation).real * d**-0.5
    return (weights * gamma[:, None, None] ** age.clamp(min=0)).tril() @ v


def drawn(n, d=8, heads=3):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(2, heads, n, d, generator=g, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("n", [1, 9, 130])
def test_is_the_complex_recurrence(n):
    q, k, v = drawn(n)
    for path in PATHS:
        torch.testing.assert_close(
            path(q, k, v, page.Config(), Call())[0], complex_form(q, k, v), rtol=1e-9, atol=1e-9
        )


def test_a_state_does_not_count_its_tokens():
    """The state stands in the frame of its last token: what 40 tokens have left reads on as the text does."""
    q, k, v = drawn(60)
    for path in PATHS:
        _, state = path(*(t[:, :, :40] for t in (q, k, v)), page.Config(), Call())
        out, _ = path(*(t[:, :, 40:] for t in (q, k, v)), page.Config(), Call(initial_state=state))
        torch.testing.assert_close(out, complex_form(q, k, v)[:, :, 40:], rtol=1e-9, atol=1e-9)


def test_self_is_the_complex_sum_over_both_sides():
    """γ^|t-s| Θ^(t-s): what comes later rotates the other way."""
    q, k, v = drawn(9)
    age = torch.arange(9)[:, None] - torch.arange(9)
    theta = 10000.0 ** -(torch.arange(4).double() / 3)
    a, b = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    weights = torch.einsum("bhnc,bhmc,nmc->bhnm", a, b.conj(), torch.exp(1j * age[..., None] * theta)).real
    gamma = 1 - 2.0 ** (-5 - torch.arange(3).double())
    wanted = (weights * gamma[:, None, None] ** age.abs()) @ v * 8**-0.5
    for path in PATHS:
        out, _ = path(q, k, v, page.Config(), Call("self"))
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


def test_scale_is_left_to_the_norm():
    q, k, v = drawn(9)
    out, louder = (page.METHOD.fast(q * s, k, v, page.Config(), Call())[0] for s in (1, 3))
    torch.testing.assert_close(louder, 3 * out)


def test_an_odd_width_is_refused():
    q = torch.zeros(1, 1, 2, 3)
    for path in PATHS:
        with pytest.raises(ValueError, match="the key width is even"):
            path(q, q, q, page.Config(), Call())
        assert path(q, q, q, page.Config(turns=False), Call())[0].shape == q.shape
