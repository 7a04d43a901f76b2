"""regard show draws whom places of an image read; maps of a trained backbone's layers are their weights."""

import json

import pytest
import torch
from typer.testing import CliRunner

from regard import attend, catalog
from regard.cli import app
from regard.core import Unsupported
from regard.core.roles import Roles
from regard.explaining.places import backbone_map, page_maps, weights_at
from regard.nn import VisionBackbone
from regard.report.drawn import Box, png, svg
from regard.report.grid_picture import ASKING, CELL, GridPicture, PlaceMap, squares

NEAR = "fused_neighborhood_attention"


def test_the_map_of_a_page_is_its_weights():
    """A window of three: nine weights, which add up to one, the others exactly zero; as softmax over them gives."""
    method = catalog.method(NEAR, window=3)
    middle, corner = page_maps(method, (6, 5), [2 * 5 + 2, 0])
    for found, box in ((middle, (slice(1, 4), slice(1, 4))), (corner, (slice(0, 3), slice(0, 3)))):
        assert (found != 0).sum((1, 2)).tolist() == [9, 9] and (found[:, *box] != 0).all()
        assert torch.allclose(found.sum((1, 2)), torch.ones(2), atol=1e-5)


def test_the_map_of_a_layer_is_that_of_its_softmax():
    torch.manual_seed(0)
    model = VisionBackbone(mechanism=["softmax", NEAR], image_size=8, patch_size=1, num_channels=1, hidden_sizes=[8, 8],
                           depths=[2, 1], num_labels=3).eval()  # fmt: skip
    image = torch.randn(1, 8, 8)
    found = backbone_map(model, image, 1, (2, 5))
    seen = {}
    layer = model.stages[0][1]
    layer.attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(image[None])
        q, k, _, _ = layer.attention.project(seen["x"], seen["x"], None, None)
        wanted = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0, :, 2 * 8 + 5].unflatten(-1, (8, 8))
    assert torch.allclose(found, wanted, atol=1e-5)
    # the second stage has a grid of its own, on which a window of seven is all there is
    last = backbone_map(model, image, -1, (3, 3))
    assert last.shape == (2, 4, 4) and (last != 0).all()
    assert not model.stages[1][0].attention._forward_pre_hooks
    with pytest.raises(ValueError, match=r"a place of the layer's grid \(place=\(4, 0\), grid=\(4, 4\)\)"):
        backbone_map(model, image, 2, (4, 0))
    with pytest.raises(ValueError, match="a layer of the model"):
        backbone_map(model, image, 3, (0, 0))


def test_a_class_token_and_a_block_have_no_map(monkeypatch):
    model = VisionBackbone(mechanism="softmax", image_size=8, num_channels=1, pooling="class")
    with pytest.raises(Unsupported, match="a class token stands nowhere"):
        backbone_map(model, torch.zeros(1, 8, 8), 0, (0, 0))
    model.stages[0][0] = torch.nn.Identity()
    with pytest.raises(Unsupported, match="layer 0 is a block"):
        backbone_map(model, torch.zeros(1, 8, 8), 0, (0, 0))


def test_weights_are_derivatives_by_the_values():
    weights = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    found = weights_at(lambda v: weights @ v, torch.zeros(1, 1, 2, 3), 0)
    assert torch.allclose(found, torch.tensor([[0.2, 0.8]]))


PICTURE = GridPicture(
    "a page",
    (PlaceMap("here", (0, 1), [[0.0, 0.5], [1.0, 0.25]]), PlaceMap("there", (1, 0), [[0, 0], [2, 0]])),
)


def test_a_terminal_shows_shades_the_place_that_asks_and_how_many_it_reads():
    lines = PICTURE.lines()
    assert lines[0] == "a page; 2 x 2 places"
    assert lines[2:8] == [
        "here     there", "┌────┐   ┌────┐", "│  [▒│   │    │", "│██░░│   │[█  │", "└────┘   └────┘",
        "reads 3 places   reads 1 place",
    ]  # fmt: skip


def test_files_have_a_square_for_each_place_dark_where_it_is_read():
    drawn = svg(PICTURE)
    # eight places, two of them framed, and the ground
    assert drawn.count("<rect") == 8 + 2 + 1
    assert drawn.count('fill="#1f5f99"') == 2 and drawn.count('fill="#d1495b"') == 2
    assert "reads 3 places" in drawn and png(PICTURE)[:4] == b"\x89PNG"
    # what is read where the question stands is drawn within its frame
    asks = [part for part in squares(PICTURE.maps[0], 5, 40) if isinstance(part, Box)]
    frame, inner = (part for part in asks if part.x > 5 + 2 and part.y < 40 + CELL)
    assert frame.colour == ASKING and (frame.x, frame.y) == (5 + CELL, 40)
    assert (inner.x - frame.x, inner.y - frame.y, frame.width - inner.width) == (3, 3, 6)
    width, height, parts = PICTURE.layout()
    assert all(0 <= part.x <= width and 0 <= part.y <= height for part in parts)


def test_show_draws_pages_of_images(tmp_path):
    run = CliRunner().invoke(
        app, ["show", f"{NEAR}:window=3,dilation=2", "--json", "--picture", str(tmp_path / "x.png")]
    )
    assert run.exit_code == 0, run.output
    drawn = json.loads(run.stdout)["places"]
    assert drawn["grid"] == [14, 14] and [m["at"] for m in drawn["maps"]] == [[7, 7], [8, 0]]
    read = [(y, x) for y, row in enumerate(drawn["maps"][0]["weights"]) for x, w in enumerate(row) if w]
    assert read == [(y, x) for y in (5, 7, 9) for x in (5, 7, 9)]
    border = [(y, x) for y, row in enumerate(drawn["maps"][1]["weights"]) for x, w in enumerate(row) if w]
    assert border == [(y, x) for y in (6, 8, 10) for x in (0, 2, 4)]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "reads 9 places" in CliRunner().invoke(app, ["show", f"{NEAR}:window=3"]).stdout


def test_roles_of_another_grid_are_refused():
    q = torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match="a place for each token"):
        attend(q, q, q, NEAR, pattern="self", roles=Roles.grid(2, 3))
