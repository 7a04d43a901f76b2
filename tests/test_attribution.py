"""Attributions against what they are by definition, and against scikit-learn and scipy."""

import itertools

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import nn

from regard.ops import attribution as at


def table(n: int, seed: int = 0):
    """A score of masks [B, n] with main effects and pairs."""
    g = torch.Generator().manual_seed(seed)
    main, pairs = torch.randn(n, generator=g).double(), torch.randn(n, n, generator=g).double()
    return lambda m: m.double() @ main + ((m.double() @ pairs) * m.double()).sum(-1)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)
        ).double()


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_integrated_gradients_are_the_integral_and_complete():
    f, x, b = network(), drawn(4, 3), drawn(4, 3, seed=2)
    found = at.integrated_gradients(f, x, b, steps=40)
    places = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    points = (b + places[:, None, None] * (x - b)).requires_grad_()
    (slopes,) = torch.autograd.grad(f(points).sum(), points)
    assert torch.allclose(found, (x - b) * slopes.mean(0), atol=1e-6)
    assert abs(at.completeness_gap(f, found, x, b)) < 1e-9
    assert abs(at.completeness_gap(f, found, x, 0.0)) > 1e-2
    assert torch.allclose(found, at.integrated_gradients(f, x, b, steps=40, batch=7), atol=1e-14)


def test_integrated_gradients_work_under_no_grad_and_leave_parameters_alone():
    f, x = network(), drawn(4, 3).float()
    f.float()
    with torch.no_grad():
        found = at.integrated_gradients(f, x)
    assert found.dtype == torch.float64 and all(p.grad is None for p in f.parameters())
    assert abs(at.completeness_gap(f, found, x)) < 1e-5


def test_of_a_polynomial_they_are_exact_up_to_the_degree():
    x, b = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()
    for steps in (1, 2, 3):
        degree = 2 * steps
        exact = at.integrated_gradients(lambda t, d=degree: t[:, 0] ** d, x, b, steps)
        assert float(exact) == pytest.approx(2.0**degree - 1, abs=1e-12)
        more = at.integrated_gradients(lambda t, d=degree: t[:, 0] ** (d + 1), x, b, steps)
        assert abs(float(more) - (2.0 ** (degree + 1) + 1)) > 1e-2


def test_expected_gradients_are_the_mean_of_integrated_gradients():
    f, x, many = network(), drawn(4, 3), drawn(5, 4, 3, seed=3)
    wanted = torch.stack([at.integrated_gradients(f, x, b) for b in many]).mean(0)
    found = at.expected_gradients(f, x, many, samples=20_000, batch=2000)
    assert torch.allclose(found, wanted, atol=0.01)
    assert (found - at.integrated_gradients(f, x, 0.0)).abs().max() > 0.03
    again = at.expected_gradients(f, x, many, samples=30, seed=4)
    assert torch.equal(again, at.expected_gradients(f, x, many, samples=30, seed=4))
    assert not torch.allclose(again, at.expected_gradients(f, x, many, samples=30, seed=5))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_occlusion_is_the_loss_without_each_part(n):
    f = table(n)
    whole = torch.ones(n, dtype=torch.bool)
    for i, loss in enumerate(at.occlusion(f, n, batch=3)):
        without = whole.clone()
        without[i] = False
        assert float(loss) == pytest.approx(float(f(whole[None]) - f(without[None])), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(("samples", "n"), [(40, 6), (20, 30), (64, 1)])
def test_the_lasso_is_at_its_minimum(samples, n, alpha):
    """Where a slope lives its column pulls by alpha times its spread, elsewhere by no more; no spread, no slope."""
    x = at.removal_masks(n, samples, seed=n).double()
    y = table(n)(x)
    x[:, 0] = 1.0 if n > 1 else x[:, 0]  # a column without spread
    w, c = at.lasso(x, y, alpha)
    left = y - c - x @ w
    assert float(left.mean()) == pytest.approx(0, abs=1e-9)
    spread = x.std(0, correction=0)
    pull = (x - x.mean(0)).T @ left / samples
    near = 1e-4 * float(y.std())
    assert bool((pull.abs() <= alpha * spread + near).all())
    lives = w != 0
    assert torch.allclose(pull[lives], (alpha * spread * w.sign())[lives], atol=near)
    assert float(w[0]) == 0 or n == 1


def test_a_surrogate_finds_what_few_parts_do():
    truth = torch.tensor([0.0, 4.0, 0.0, -2.0, 0.0, 0.0]).double()

    def f(masks):
        assert masks.dtype == torch.bool and len(masks) <= 16
        return 1.0 + masks.double() @ truth

    found = at.removal_surrogate(f, 6, samples=48, alpha=0.01, batch=16)
    assert torch.allclose(found, truth, atol=0.05) and (found[truth == 0] == 0).all()
    assert torch.equal(found, at.removal_surrogate(f, 6, samples=48, alpha=0.01, batch=5))
    assert (at.removal_surrogate(f, 6, samples=48, alpha=100.0, batch=9) == 0).all()


def test_masks_keep_the_asked_share():
    masks = at.removal_masks(50, 400, seed=3, keep=0.8)
    assert masks.float().mean() == pytest.approx(0.8, abs=0.01)
    assert masks.float().mean(0).min() > 0.7 and not torch.equal(masks, at.removal_masks(50, 400, 4, 0.8))


def test_lime_is_a_weighted_ridge_on_removals_of_every_size():
    seen = []

    def f(masks):
        seen.append(masks)
        return table(5)(masks)

    found = at.lime(f, 5, samples=300, seed=2)
    masks = torch.cat(seen)
    assert masks[0].all() and {*masks[1:].sum(1).tolist()} == {0, 1, 2, 3, 4}
    assert masks[1:].float().mean(0).std() < 0.05
    kept = masks.double()
    cosine = torch.cosine_similarity(kept, torch.ones_like(kept), dim=1)
    # as in LIME's text explainer: distances of 0 to 100, a kernel of 25, and its root
    weights = (-((100 * (1 - cosine)) ** 2) / 25**2).exp().sqrt()
    model = Ridge(alpha=1.0).fit(kept, table(5)(masks), sample_weight=weights)
    assert torch.allclose(found, torch.from_numpy(model.coef_), atol=1e-10)


def test_the_linear_datamodelling_score_is_spearmans():
    masks, scores = at.removal_masks(5, 60, seed=9), torch.tensor([0.5, 0.5, 0.0, -1.0, 2.0])
    effects = table(5)(masks).round()  # with ties
    wanted = spearmanr(masks.double() @ scores.double(), effects).statistic
    assert at.linear_datamodelling_score(scores, masks, effects) == pytest.approx(wanted, abs=1e-12)
    assert at.linear_datamodelling_score(-scores, masks, effects) == pytest.approx(-wanted, abs=1e-12)
    assert at.linear_datamodelling_score(torch.zeros(5), masks, effects) == 0.0


def test_the_exact_effects_of_a_line_order_it_perfectly():
    truth = drawn(6)
    masks = at.removal_masks(6, 40, seed=1)
    effects = masks.double() @ truth
    assert at.linear_datamodelling_score(truth, masks, effects.exp()) == pytest.approx(1)


def test_what_is_lost_without_the_best_parts():
    f, scores = table(6), torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, -5.0])
    for k in range(1, 7):
        best = sorted(range(6), key=lambda i: (-float(scores[i]), i))[:k]
        kept = torch.tensor([[i not in best for i in range(6)]])
        wanted = f(torch.ones(1, 6, dtype=torch.bool)) - f(kept)
        assert at.top_k_drop(f, scores, k) == pytest.approx(float(wanted), abs=1e-12)


def test_of_a_line_the_surrogate_names_the_parts_whose_loss_is_largest():
    truth = torch.tensor([0.3, 2.0, -1.0, 1.0, 0.0]).double()

    def f(masks):
        return masks.double() @ truth

    found = at.removal_surrogate(f, 5, samples=64, alpha=1e-3)
    drops = [float(truth[list(some)].sum()) for some in itertools.combinations(range(5), 2)]
    assert at.top_k_drop(f, found, 2) == pytest.approx(max(drops))


def test_bad_input_is_refused_by_its_rule():
    f, x = network(), drawn(4, 3)
    for wrong, rule in (
        (lambda: at.integrated_gradients(f, x, steps=0), "steps >= 1"),
        (lambda: at.integrated_gradients(f, x, batch=0), "batch >= 1"),
        (lambda: at.integrated_gradients(lambda t: t.sum(), x), "a score for each variant"),
        (lambda: at.expected_gradients(f, x, x), "baselines are"),
        (lambda: at.expected_gradients(f, x, x[None], samples=0), "samples >= 1"),
        (lambda: at.occlusion(table(1), 0), "one part"),
        (lambda: at.occlusion(lambda m: m, 2), "a score for each variant"),
        (lambda: at.removal_masks(3, 4, keep=1.0), "0 < keep < 1"),
        (lambda: at.removal_surrogate(table(3), 3, alpha=-1.0), "alpha > 0"),
        (lambda: at.lasso(x, x, 0.1), r"x \[S, n\] and y \[S\]"),
        (lambda: at.lime(table(3), 3, width=0.0), "width > 0"),
        (lambda: at.linear_datamodelling_score(x[0], x, x[:1, 0]), r"masks \[S, n\]"),
        (lambda: at.top_k_drop(table(3), x[0], 4), "1 <= k <= parts"),
    ):
        with pytest.raises(ValueError, match=rule):
            wrong()
