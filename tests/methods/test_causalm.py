"""CausaLM: what reversal does to gradients, what the effects are where they are known, and what is refused."""

import pytest
import torch
from torch import nn

from regard.methods.tracing.causalm import Config, measure, objective, reverse


def test_reversal_turns_the_encoder_round_and_leaves_the_head():
    torch.manual_seed(0)
    encoder, head = nn.Linear(3, 4), nn.Linear(4, 2)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    plain = nn.functional.cross_entropy(head(encoder(x)), y)
    wanted = torch.autograd.grad(plain, [*encoder.parameters(), *head.parameters()])
    for factor in (1.0, 0.3, 0.0):
        loss = nn.functional.cross_entropy(head(reverse(encoder(x), factor)), y)
        assert loss == plain
        got = torch.autograd.grad(loss, [*encoder.parameters(), *head.parameters()])
        for name, a, b in zip(("w", "b", "head w", "head b"), got, wanted, strict=True):
            torch.testing.assert_close(a, b if "head" in name else -factor * b, msg=f"{name} at {factor}")


def test_reversal_twice_is_plain_and_works_under_vmap_and_grad():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(reverse(reverse(x, 2.0), 0.5).sin().sum(), x)
    torch.testing.assert_close(g, x.detach().cos())
    under = torch.func.grad(lambda t: reverse(t, 3.0).square().sum())(x.detach())
    torch.testing.assert_close(under, -6 * x.detach())


def test_the_objective_weighs_its_parts():
    parts = torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0)
    assert objective(*parts, Config()) == 111
    assert objective(*parts, Config(treated=0.5, control=2.0)) == 206
    assert objective(*parts, Config(control=0.0)) == 11
    for wrong in (dict(reversal=-1.0), dict(treated=-0.1), dict(control=-2.0)):
        with pytest.raises(ValueError, match="not negative"):
            Config(**wrong)


@pytest.mark.parametrize(
    ("share", "effect", "confounding"), [(0.5, 0.2, 0.3), (0.75, 0.1, 0.4), (0.9, 0.3, 0.0)]
)
def test_known_effects(share, effect, confounding):
    """A classifier that knows P(label | treated, control), and one that knows P(label | control)."""
    n = 1000
    rows = [
        (t, c) for c in (0, 1) for t in (0, 1) for _ in range(round(n * (share if t == c else 1 - share)))
    ]
    treated, control = torch.tensor(rows, dtype=torch.float64).T

    def chances(p):
        return torch.stack([1 - p, p], -1)

    told = 0.1 + effect * treated + confounding * control
    blind = 0.1 + effect * torch.where(control == 1, share, 1 - share) + confounding * control
    pairs = torch.stack([chances(told + effect * (v - treated)) for v in (1, 0)])
    found = measure(chances(told), chances(blind), pairs, treated)
    assert found["ate"].item() == pytest.approx(2 * effect)
    assert found["conexp"].item() == pytest.approx(2 * (effect + (2 * share - 1) * confounding))
    assert found["treate"].item() == pytest.approx(2 * share * (1 - share) * 2 * effect)


def test_what_is_no_distribution_is_refused():
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    pairs, concept = torch.stack([p, p]), torch.tensor([1, 0])
    assert measure(p, p, pairs, concept)["treate"] == 0
    for wrong in ((p.log(), p, pairs, concept), (p, 2 * p, pairs, concept), (p, p, pairs - 0.5, concept)):
        with pytest.raises(ValueError, match="probabilities"):
            measure(*wrong)
    for wrong in ((p, p[:1], pairs, concept), (p, p, pairs[:1], concept), (p, p, pairs, concept[:1])):
        with pytest.raises(ValueError, match="factual and forgetful"):
            measure(*wrong)
    for all_one in (torch.ones(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="without it"):
            measure(p, p, pairs, all_one)
