"""Fault-lines where the smallest set is not promised: no move can be spared, and few sets are too large."""

import pytest
import torch

from regard.methods.tracing import cx_tom as page


def bent(seed, rows=12, concepts=5, classes=4):
    """A head with a hidden layer, and what a fault-line needs beside it."""
    g = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((concepts, 12), (12, classes))
    )
    a, t = (torch.rand(rows, concepts, generator=g, dtype=torch.float64) for _ in "at")
    return lambda x: (x @ first).relu() @ second, a, t, torch.randint(classes, (rows,), generator=g)


def after(case, moves):
    head, a, t, alt = case
    return page.lead(head, page.moved(a, t, *page.whole(moves)), alt)


def test_on_bent_heads_no_move_can_be_spared_and_few_sets_are_too_large():
    excess, possible = [], 0
    for seed in range(6):
        case = bent(seed)
        line, least = page.measure(*case), page.reference(*case)
        found = line.lead > 0
        possible += int((least.lead > 0).sum())
        assert torch.equal(line.lead, after(case, line.moves))
        assert not line.moves[~found].any()
        for k in range(5):
            spared = after(case, line.moves.index_fill(1, torch.tensor([k]), 0)) > 0
            assert not (spared & found & (line.moves[:, k] != 0)).any()
        size, smallest = line.moves.abs().sum(1), least.moves.abs().sum(1)
        assert (size >= smallest)[found].all()
        excess.append((size - smallest)[found])
    excess = torch.cat(excess)
    assert len(excess) >= 0.85 * possible and excess.mean() <= 0.1


def test_before_pruning_already_the_sets_are_sparse():
    """The penalty, and not the last step, makes them small."""
    sizes = []
    for seed in range(4):
        case = bent(seed, rows=20, concepts=10)
        head, a, t, alt = case
        moves = page.sparse(head, a, t, alt, lambda m, case=case: after(case, m), page.Config())
        pruned = page.pruned(lambda m, case=case: after(case, m), moves)
        sizes.append(torch.stack([moves.abs().sum(1), pruned.abs().sum(1)]))
    first, last = torch.cat(sizes, 1).mean(1)
    assert last <= first <= 1.5 * last


def test_rows_do_not_know_each_other():
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 3, generator=g, dtype=torch.float64)
    a, t = (torch.rand(7, 6, generator=g, dtype=torch.float64) for _ in "at")
    alt = torch.randint(3, (7,), generator=g)
    whole = page.measure(lambda x: x @ weights, a, t, alt)
    for b in range(7):
        one = page.measure(lambda x: x @ weights, a[b : b + 1], t[b : b + 1], alt[b : b + 1])
        assert torch.equal(one.moves[0], whole.moves[b])


def test_what_is_no_activation_is_refused():
    case = bent(0)
    with pytest.raises(ValueError, match="not negative"):
        page.measure(case[0], -case[1], case[2], case[3])
    with pytest.raises(ValueError, match="a typical activation for each"):
        page.measure(case[0], case[1], case[2][:, :3], case[3])
    with pytest.raises(ValueError, match="ratio"):
        page.Config(ratio=1.0)


def test_what_is_added_never_lowers_an_activation():
    a, t = torch.tensor([[0.5, 0.2, 0.0]]), torch.tensor([[0.3, 0.6, 0.0]])
    assert torch.equal(page.moved(a, t, torch.zeros(1, 3), torch.ones(1, 3)), torch.tensor([[0.5, 0.6, 0.0]]))
    assert not page.moved(a, t, torch.ones(1, 3), torch.zeros(1, 3)).any()


def test_the_move_that_gains_least_is_spared_first():
    gains = torch.tensor([[1.0, 2.0, 4.0]])
    kept = page.pruned(lambda moves: (moves * gains).sum(1) - 3.5, torch.ones(1, 3))
    assert kept.tolist() == [[0.0, 0.0, 1.0]]
