"""What the cascades of fusemax are counted with: traversals, reach, live elements; and that faults are seen."""

import pytest
import torch

from regard.claims.findings import fusemax as claim
from regard.claims.findings.fusemax import Fibre, Live, Rank


def test_one_pass_by_hand():
    """Scores 0 and ln 3 in tiles of one key: weights 1/4 and 3/4."""
    k, v = torch.tensor([[1.0], [3.0]]).log(), torch.tensor([[4.0], [8.0]]).expand(2, claim.VALUE)
    for cascade in claim.CASCADES.values():
        rank = Rank(2, 1)
        out = cascade(torch.ones(1), Fibre(rank, k), Fibre(rank, v), rank)
        torch.testing.assert_close(out[:1], torch.tensor([7.0]))


@pytest.mark.parametrize("name", claim.CASCADES)
@pytest.mark.parametrize(("length", "tile"), [(1, 1), (7, 3), (64, 64), (65, 64), (5, 8)])
def test_cascades_are_softmax_attention_where_plain_exponentials_overflow(name, length, tile):
    q, k, v = (x.double() for x in claim.inputs(length, seed=length))
    row = claim.counted(claim.CASCADES[name], 300 * q, k, v, tile)
    torch.testing.assert_close(row["out"], claim.plain(300 * q, k, v), rtol=1e-9, atol=1e-9)
    assert row["traversals"] == claim.PASSES[name] and row["left"] == 0


def test_only_the_tile_of_the_traversal_is_in_reach():
    rank = Rank(10, 4)
    keys = Fibre(rank, torch.arange(10.0))
    with pytest.raises(ValueError, match="at which the traversal stands"):
        keys[0]
    for tile in rank.traverse():
        assert keys[tile].tolist() == list(range(10))[rank.tiles[tile]]
        with pytest.raises(ValueError, match="at which the traversal stands"):
            keys[tile + 1]
        with pytest.raises(ValueError, match="ends before the next"):
            next(rank.traverse())
    assert rank.traversals == 1


def test_live_elements_come_and_go_with_their_last_tensor():
    given = torch.ones(100)
    with Live(given) as live:
        half = given[:50]
        assert len(half) == 50 and live.now == 0
        a = torch.zeros(30)
        view = a[3:]
        assert live.now == 30
        del a
        assert live.now == 30 and view.shape == (27,)
        b = view + 1
        b += 1
        assert live.now == 57
        del view
        assert live.now == 27
        del b
        assert (live.now, live.peak, live.largest) == (0, 57, 30)


def leaky(q, k, v, rank):
    """One pass that keeps its scores."""
    kept = Fibre(rank)
    top, total, mixed = q.new_full((), float("-inf")), q.new_zeros(()), q.new_zeros(claim.VALUE)
    for tile in rank.traverse():
        kept[tile] = k[tile] @ q
        before, top = top, torch.maximum(top, kept[tile].amax())
        part = (kept[tile] - top).exp()
        total, mixed = (
            (before - top).exp() * total + part.sum(),
            (before - top).exp() * mixed + part @ v[tile],
        )
    return mixed / total


def uncorrected(q, k, v, rank):
    """One pass that forgets what its maximum was."""
    top, total, mixed = q.new_full((), float("-inf")), q.new_zeros(()), q.new_zeros(claim.VALUE)
    for tile in rank.traverse():
        scores = k[tile] @ q
        top = torch.maximum(top, scores.amax())
        total, mixed = total + (scores - top).exp().sum(), mixed + (scores - top).exp() @ v[tile]
    return mixed / total


def unseen(q, k, v, rank):
    """Keys are put together in one traversal, and walked by torch afterwards."""
    keys, values = zip(*((k[tile], v[tile]) for tile in rank.traverse()), strict=True)
    return (torch.cat(keys) @ q).softmax(0) @ torch.cat(values)


@pytest.mark.parametrize(
    ("cascade", "broken"), [(leaky, "most_slope"), (uncorrected, "difference"), (unseen, "largest")]
)
def test_a_planted_fault_is_seen(monkeypatch, cascade, broken):
    monkeypatch.setattr(claim, "LENGTHS", (64, 100, 128))
    assert claim.measure().holds
    good = claim.of("one")
    monkeypatch.setitem(claim.CASCADES, "one", cascade)
    assert not claim.measure().holds
    assert claim.of("one")[broken] > good[broken]
