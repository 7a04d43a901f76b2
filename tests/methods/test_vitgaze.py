"""ViTGaze's own laws: guidance within the thing, rows not columns, the order of heads; what its claim reads."""

import pytest
import torch

from regard.claims.tracing import vitgaze as claim
from regard.explaining.places import backbone_map
from regard.methods.tracing import vitgaze


def drawn(seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.rand(2, h, 6, 6, generator=g, dtype=torch.float64) for h in (2, 3)]
    inside = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]).bool()
    return weights, inside, torch.randn(2, 6, generator=g, dtype=torch.float64)


def test_one_place_gives_its_rows_head_by_head_in_the_order_of_layers():
    weights, inside, logits = drawn()
    for given in (None, logits):
        found = vitgaze.measure(weights, inside, given)
        torch.testing.assert_close(found.maps[1], torch.cat([w[1, :, 1] for w in weights]))


def test_places_outside_of_the_thing_weigh_nothing_whatever_their_logits():
    weights, inside, logits = drawn()
    first = vitgaze.measure(weights, inside, logits)
    other = vitgaze.measure(weights, inside, torch.where(inside, logits + 3, 50.0))
    assert bool((first.guide[~inside] == 0).all()) and torch.allclose(
        first.guide.sum(1), torch.ones(2).double()
    )
    torch.testing.assert_close(other.maps, first.maps)
    assert first.guide[0].unique().numel() == 4, "logits tell the places of a thing apart"


def test_without_logits_its_places_weigh_alike():
    weights, inside, _ = drawn()
    assert torch.equal(vitgaze.guidance(inside), inside / inside.sum(1, keepdim=True).double())
    found = vitgaze.measure(weights, inside).maps[0, 0]
    torch.testing.assert_close(found, weights[0][0, 0, inside[0]].mean(0))


def test_features_are_guided_alike():
    _, inside, logits = drawn()
    x, guide = torch.rand(2, 6, 3, dtype=torch.float64), vitgaze.guidance(inside, logits)
    torch.testing.assert_close(vitgaze.guided_features(x, guide), torch.einsum("bn,bnc->bc", guide, x))


def test_what_does_not_go_together_is_refused():
    weights, inside, logits = drawn()
    with pytest.raises(ValueError, match="a place or more"):
        vitgaze.measure(weights, inside & False)
    with pytest.raises(ValueError, match="a logit for each place"):
        vitgaze.measure(weights, inside, logits[:, :5])
    for wrong in ([], [weights[0][:, :, :5]], [weights[0][:1]]):
        with pytest.raises(ValueError, match="of a layer or more"):
            vitgaze.measure(wrong, inside)


def test_the_claim_reads_the_weights_that_the_tower_uses():
    model = claim.tower(0).eval()
    images, arrow, _, _ = claim.scenes(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers, x = claim.weights(model, images)
    assert len(layers) == claim.LAYERS and x.shape == (2, 16, claim.WIDTH)
    for i, layer in enumerate(layers):
        wanted = backbone_map(model, images[0], i, divmod(arrow[0].item(), claim.SIDE)).flatten(1)
        torch.testing.assert_close(layer[0, :, arrow[0]], wanted, rtol=1e-4, atol=1e-5)


def test_the_scenes_of_the_claim_have_one_thing_ahead_of_the_arrow():
    arrows, things = claim.patterns()
    images, arrow, thing, target = claim.scenes(200, torch.Generator().manual_seed(0))
    cells = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(1, 3).round().clamp(0, 1)  # [n, 16, 4, 4]
    known = torch.cat([arrows, things])
    assert torch.unique(known.flatten(1), dim=0).shape[0] == len(known), "patterns can be told apart"
    for image, at, what, where in zip(cells, arrow.tolist(), thing.tolist(), target.tolist(), strict=True):
        kind = [next((i for i, p in enumerate(known) if torch.equal(p, cell)), None) for cell in image]
        assert sum(k is not None for k in kind) == claim.THINGS + 1 and kind[where] == 4 + what
        y, x = claim.DOWN_RIGHT[kind[at]].tolist()
        ahead = [(at // 4 + k * y, at % 4 + k * x) for k in range(1, 4)]
        seen = [4 * r + c for r, c in ahead if 0 <= r < 4 and 0 <= c < 4]
        assert [s for s in seen if kind[s] is not None] == [where]


def test_decoders_are_equally_large():
    sizes = [sum(p.numel() for p in claim.decoder(side, 0).parameters()) for side in ("maps", "features")]
    assert abs(sizes[0] / sizes[1] - 1) <= 0.02
