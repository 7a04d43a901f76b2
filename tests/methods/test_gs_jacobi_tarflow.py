"""The inversions of gs_jacobi_tarflow on a flow with random weights: all ways agree, and a sweep settles a token."""

import pytest
import torch

from regard.claims.findings import gs_jacobi_tarflow as claim

TOKENS = 16


def drawn(tokens):
    block = claim.Block(tokens).double().requires_grad_(False)
    for p in block.parameters():
        p.copy_(torch.randn_like(p) * 0.2)
    for p in block.outward.parameters():
        p.mul_(0.5)
    return block


@pytest.fixture
def block():
    torch.manual_seed(0)
    return drawn(TOKENS)


@pytest.fixture
def z():
    return torch.randn(3, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_inverse_is_that_of_the_block(block, z):
    x = claim.one_by_one(block, z)
    back, s = block(x)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    assert (s[:, 0] == 0).all() and (s[:, 1:].abs() > 1e-3).all()


def test_the_loss_is_that_of_a_change_of_variables():
    """½ z² less the logarithm of |dz/dx|, for each token, the turns between blocks included."""
    torch.manual_seed(0)
    flow = claim.Flow(6).double().requires_grad_(False)
    flow.blocks = torch.nn.ModuleList(drawn(6) for _ in flow.blocks)
    x = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def through(x):
        for block in flow.blocks:
            x = block(x)[0].flip(1)
        return x

    jacobian = torch.autograd.functional.jacobian(through, x).view(6, 6)
    wanted = (through(x).square().sum() / 2 - torch.linalg.slogdet(jacobian)[1]) / 6
    torch.testing.assert_close(flow.loss(x), wanted)
    torch.testing.assert_close(flow.sampled(through(x), claim.one_by_one), x)


@pytest.mark.parametrize("init", ["z", "zeros"])
def test_each_sweep_settles_one_token_more(block, z, init):
    right, x = claim.one_by_one(block, z), claim.begun(z, init)
    for k in range(1, TOKENS):
        x = claim.swept(block, z, x)
        torch.testing.assert_close(x[:, : k + 1], right[:, : k + 1], rtol=1e-9, atol=1e-9)
        assert k > 4 or not torch.allclose(x[:, k + 1], right[:, k + 1], atol=1e-9)


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 16])
def test_segments_give_the_same_and_a_segment_of_one_takes_one_sweep(block, z, segments):
    x, sweeps = claim.by_segments(block, z, claim.begun(z, "z"), segments)
    torch.testing.assert_close(x, claim.one_by_one(block, z), rtol=0, atol=1e-3)
    assert 1 <= sweeps <= TOKENS // segments  # in a segment one less, and one to see that it stands
    assert segments < TOKENS or sweeps == 1


def test_the_metrics_are_their_definition(block):
    flow = claim.Flow(TOKENS).double().requires_grad_(False)
    flow.blocks[0] = block
    x = torch.randn(5, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, (z, s) = claim.metrics(flow, x)[0], block(x)
    scaled = sum((row * torch.exp(-scale)) for row, scale in zip(x, s, strict=True)) / 5
    w_s, w_u = block.outward.weight
    wanted = scaled.pow(2).sum().sqrt() * w_s.pow(2).sum().sqrt() + w_u.pow(2).sum().sqrt()
    assert found.crm == pytest.approx(wanted.item())
    left = {}
    for init in ("z", "zeros"):
        s, u, _ = block.next(claim.begun(z, init))
        after = z.clone()
        after[:, 1:] = z[:, 1:] * s[:, :-1].exp() + u[:, :-1]
        left[init] = (after - x).mean(0).pow(2).sum()
    assert found.init == min(left, key=left.get)
