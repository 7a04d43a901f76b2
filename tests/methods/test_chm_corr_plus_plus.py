"""The parts of the vote over patches: canvases and their digits, votes by hand, what a user's edit may change."""

import pytest
import torch

from regard.claims.digits import digits, untrained
from regard.claims.findings import chm_corr_plus_plus as claim


def test_every_canvas_shows_its_digit_and_says_where():
    scene = claim.scenes("choice", 4)
    images, labels = digits()["choice"]
    assert torch.equal(scene.labels, labels) and scene.images.shape == (300, 1, 16, 16)
    again, other = claim.scenes("choice", 4), claim.scenes("choice", 5)
    assert torch.equal(again.images, scene.images) and not torch.equal(other.images, scene.images)
    for canvas, digit, on in zip(scene.images[:20, 0], images[:20, 0], scene.on_digit[:20]):
        places = [
            (y, x) for y in range(9) for x in range(9) if torch.equal(canvas[y : y + 8, x : x + 8], digit)
        ]
        assert places
        ink = [(y + a, x + b) for y, x in places[:1] for a, b in (digit > 0).nonzero().tolist()]
        assert {*on.nonzero()[:, 0].tolist()} == {8 * (y // 2) + x // 2 for y, x in ink}
        rest = canvas.clone()
        for y, x in places:
            rest[y : y + 8, x : x + 8] = 0
        assert (rest > 0).sum() < 4 * 16 + 1  # no more than the pieces


def query(best, near, on=None):
    n, _, patches = best.shape
    on = torch.zeros(n, patches, dtype=torch.bool) if on is None else on
    return claim.Query(best, near, torch.ones(n, patches), near[:, 0], on)


def test_votes_by_hand(monkeypatch):
    monkeypatch.setattr(claim, "NEIGHBOURS", 3)
    best = torch.tensor([[[0.9, 0.0], [0.8, 0.1], [0.7, 0.2], [0.1, 0.95]]])  # four candidates, two patches
    near = torch.tensor([[8, 7, 7, 2]])
    masks = torch.tensor([[[True, False]], [[False, True]], [[True, True]]])
    assert [claim.votes(query(best, near), mask).item() for mask in masks[:1]] == [7]  # 8, 7, 7
    monkeypatch.setattr(claim, "NEIGHBOURS", 2)
    # equally many: the larger sum of scores, of one patch and of both
    assert [claim.votes(query(best, near), mask).item() for mask in masks] == [8, 2, 2]


def test_the_unedited_map_is_that_of_the_strongest_correspondences():
    g = torch.Generator().manual_seed(0)
    q = query(torch.rand(3, 6, claim.PATCHES, generator=g), torch.zeros(3, 6, dtype=torch.long))
    q = q._replace(size=torch.rand(3, claim.PATCHES, generator=g))
    chosen, strength = claim.unedited(q), q.size * q.best.mean(1)
    assert (chosen.sum(1) == claim.MAP).all()
    for row, values in zip(chosen, strength):
        assert values[row].min() > values[~row].max()


@pytest.mark.parametrize(("knows", "low", "high"), [(0.0, 0.1, 0.3), (0.5, 0.5, 0.7), (1.0, 1.0, 1.0)])
def test_an_edit_exchanges_a_third_of_the_map_and_knows_the_digit_so_often(knows, low, high):
    g = torch.Generator().manual_seed(1)
    n = 400
    on = torch.zeros(n, claim.PATCHES, dtype=torch.bool)
    on[:, 20:32] = True
    before = claim.drawn(torch.ones(n, claim.PATCHES), claim.MAP, g)
    q = query(torch.zeros(n, 2, claim.PATCHES), torch.zeros(n, 2, dtype=torch.long), on)
    after = claim.edited(q, before, knows, g)
    assert (after.sum(1) == claim.MAP).all() and ((before & ~after).sum(1) == 4).all()
    new = (after & ~before).nonzero()[:, 1]
    share = ((new >= 20) & (new < 32)).double().mean().item()
    assert low <= share <= high
    assert (before & ~after).any(0).all() and (knows == 1 or (after & ~before).any(0).all())


def test_a_patch_finds_its_like_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(claim, "network", untrained)
    q = claim.queries("choice", 4)
    scene, gallery = claim.scenes("choice", 4), claim.scenes("train", 1004)
    ours, theirs = claim.patches(scene.images[:1])[0], claim.patches(gallery.images)
    unit = torch.nn.functional.normalize
    near = (unit(ours.mean(0), dim=0) @ unit(theirs.mean(1), dim=1).T).topk(claim.CANDIDATES).indices
    # those that are equally near to the last digit may stand in another order
    assert torch.equal(q.near[0].sort().values, gallery.labels[near].sort().values)
    a, b = ours - theirs.mean((0, 1)), theirs[near] - theirs.mean((0, 1))
    wanted = torch.cosine_similarity(a[None, :, None], b[:, None], dim=-1).amax(2)  # [candidates, patches]
    torch.testing.assert_close(q.best[0].sum(1).sort().values, wanted.sum(1).sort().values)
    torch.testing.assert_close(q.best[0, 0], wanted[0])
    torch.testing.assert_close(q.size[0], a.norm(dim=1))
