"""The two forms of scan_and_snap's attention, by positions and by counts, and its gradient at the start."""

import torch
from torch.nn import functional as F

from regard.claims.findings import scan_and_snap as claim


def test_counts_are_attention_over_positions():
    at = claim.Setting(classes=3, lasts=3)
    g = torch.Generator().manual_seed(0)
    classes = torch.tensor([2, 0, 1, 2])
    x = claim.texts(claim.chances(at), classes, g)
    z, y = torch.randn(3, at.tokens, generator=g), torch.randn(3, at.tokens, generator=g)
    rows = z[at.last(classes)]
    weights = rows.gather(1, x).softmax(1)  # [B, LENGTH]
    mixed = (weights[..., None] * F.one_hot(x, at.tokens)).sum(1)
    wanted = F.normalize(mixed, dim=1) @ y.T
    torch.testing.assert_close(claim.logits(claim.counts(x, at.tokens), rows, y), wanted)


def test_texts_are_of_their_class():
    at = claim.Setting(classes=4)
    p = claim.chances(at)
    torch.testing.assert_close(p.sum(1), torch.ones(4))
    torch.testing.assert_close(p[0, :10].sum(), torch.tensor(10 / 15.5))  # 10 of 10 + (0.1 + ... + 1)
    classes = torch.arange(4).repeat(500)
    n = claim.counts(claim.texts(p, classes, torch.Generator().manual_seed(1)), at.tokens)
    assert (n.sum(1) == claim.LENGTH).all()
    share = torch.stack([n[classes == c].mean(0) for c in range(4)]) / claim.LENGTH
    torch.testing.assert_close(share, p, atol=2e-3, rtol=0)
    assert (share[p == 0] == 0).all()


def test_one_step_of_an_endless_text_moves_attention_from_common_to_distinct_tokens():
    """With Y ahead of Z, as the theory has it: -dL/dZ is negative on common tokens and ordered on distinct ones."""
    at = claim.Setting(classes=5)
    p, label = claim.chances(at).double(), torch.arange(5)
    y = torch.zeros(5, at.tokens, dtype=torch.float64, requires_grad=True)
    z = torch.zeros(1, at.tokens, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        [dy] = torch.autograd.grad(F.cross_entropy(claim.logits(p, z[at.last(label)], y), label), y)
        y = (y - dy).detach().requires_grad_()
    [dz] = torch.autograd.grad(F.cross_entropy(claim.logits(p, z[at.last(label)], y), label), z)
    assert (dz[0, : claim.COMMON] > 0).all()
    for c in range(5):
        own = -dz[0, claim.distinct(c)]
        assert own[-1] > 0 and (own.diff() > 0).all()


def test_what_is_reported_of_z_by_hand():
    at = claim.Setting(classes=2, lasts=2)
    z = torch.zeros(2, at.tokens)
    torch.testing.assert_close(claim.expected(z, at), claim.chances(at).double())
    z[0, : claim.COMMON] = -torch.tensor(3.0).log()
    c = claim.expected(z, at)
    torch.testing.assert_close(c[0, :10].sum(), torch.tensor(10 / 3 / (10 / 3 + 5.5), dtype=torch.float64))
    torch.testing.assert_close(c[1, :10].sum(), torch.tensor(10 / 15.5, dtype=torch.float64))
    ordered = torch.linspace(0, 1, 10)
    z[0, claim.distinct(0)], z[1, claim.distinct(1)] = ordered, -0.01 * ordered  # c rises in both
    torch.testing.assert_close(claim.orders(z, at, claim.chances(at)), [1.0, -1.0])
