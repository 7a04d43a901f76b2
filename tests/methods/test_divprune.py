"""DivPrune: copies stay last, and the kept tokens are nearly as far apart as can be."""

import torch

from regard.methods.tokens.divprune import Config, distances, measure


def test_copies_stay_last_and_none_stays_twice():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=g)
    copied = torch.cat([x, x, x])
    kept = measure(copied, Config(keep=5))
    assert {*(kept % 5).tolist()} == {*range(5)}
    assert len({*measure(copied, Config(keep=12)).tolist()}) == 12


def test_the_nearest_kept_pair_is_at_least_a_quarter_as_far_apart_as_the_best_sets():
    """Greedy choice comes to half of the best in a metric; cosine distance is half the square of one."""
    for seed in range(5):
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        apart = distances(x).fill_diagonal_(torch.inf)
        best = torch.stack([apart[s][:, s].min() for s in torch.combinations(torch.arange(10), 4)])
        kept = measure(x, Config(keep=4))
        assert apart[kept][:, kept].min() >= best.max() / 4 and apart[kept][:, kept].min() > best.median()
