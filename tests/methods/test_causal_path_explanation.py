"""Paths in a network where they can be multiplied out, and the rank correlation of the claim."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr

from regard.methods.tracing import causal_path_explanation as page
from regard.ops.ranks import rank_correlation


def linear(seed, *widths):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(a, b, generator=g, dtype=torch.float64) for a, b in pairwise(widths)]
    x = torch.rand(6, widths[0], generator=g, dtype=torch.float64) + 0.5
    return [lambda h, w=w: h @ w for w in weights], weights, x


def test_in_a_linear_network_effects_are_sums_over_kept_paths():
    layers, weights, x = linear(3, 4, 5, 5, 3)
    graph = page.measure(layers, x, 1, page.Config(z=0.0, share=0.0))
    first, second, third = weights
    assert 0 < graph.kept[1].sum() < 5
    kept = graph.kept[1].double()
    torch.testing.assert_close(graph.effects[1], x @ first @ second * third[:, 1])
    torch.testing.assert_close(graph.effects[0], x @ first * (second @ (kept * third[:, 1])))
    through = graph.edges[0].sum(1)
    torch.testing.assert_close(through, graph.effects[0].mean(0) * graph.kept[0])
    path = first @ (graph.kept[0] * (second @ (kept * third[:, 1])))
    torch.testing.assert_close(graph.saliency, path.expand_as(x))


def test_with_all_units_kept_the_saliency_is_the_gradient():
    layers, _, x = linear(0, 3, 4, 2)
    bent = [lambda h: layers[0](h).tanh(), layers[1]]
    clean = page.states(bent, x)
    every = [torch.ones(h.shape[1]).bool() for h in clean[:-1]] + [torch.tensor([True, False])]
    x = x.requires_grad_()
    wanted = torch.autograd.grad(page.states(bent, x)[-1][:, 0].sum(), x)[0]
    torch.testing.assert_close(page.saliency(bent, clean, 0, every), wanted)


def test_the_walk_ends_where_no_unit_counts():
    layers = [lambda h: h, lambda h: h, lambda h: -h.square().sum(1, keepdim=True)]
    graph = page.measure(layers, torch.rand(4, 3) + 1, 0)
    assert not graph.kept[0].any() and not graph.kept[1].any()
    assert (graph.effects[1] < 0).all() and not graph.effects[0].any() and not graph.saliency.any()


def test_an_effect_must_stand_above_its_error():
    # the last: 2.1, which is over twice its standard error of 0.9 and not over twice its deviation of 1.27
    effects = torch.tensor([[1.0, 9.0, 4.0, 0.2, 1.2], [1.2, -8.0, 4.0, 0.2, 3.0]])
    assert page.significant(effects, page.Config(z=2.0, share=0.1)).tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert page.significant(effects, page.Config(z=0.0, share=0.0)).all()


def test_what_has_no_error_or_no_class_is_refused():
    layers, _, x = linear(0, 3, 4, 2)
    with pytest.raises(ValueError, match="two examples"):
        page.measure(layers, x[:1], 0)
    with pytest.raises(ValueError, match="a class of the logits"):
        page.measure(layers, x, 2)
    with pytest.raises(ValueError, match="share"):
        page.Config(share=1.5)


def test_the_rank_correlation_is_that_of_scipy_ties_included():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5, (6, 12), generator=g).double() for _ in "ab")
    wanted = torch.tensor([spearmanr(x, y).statistic for x, y in zip(a, b)])
    torch.testing.assert_close(rank_correlation(a, b), wanted)


def test_cases_keep_some_units_and_leave_others():
    """Where nothing is kept, measure and reference agree on zeros alone."""
    layers = [keep for seed in range(2) for case in page.cases(seed) for keep in page.measure(*case).kept]
    assert sum(bool(keep.any() and not keep.all()) for keep in layers) >= len(layers) / 2
