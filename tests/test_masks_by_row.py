"""Rows whose roles and images lie at different places: each has the mask that it has alone."""

import pytest
import torch
from transformers import DynamicCache

from regard import catalog
from regard.attaching import masking
from regard.attaching.attachment import attach
from regard.core import Edit, Site
from regard.core.mask import Coordinates, predicate
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.script import NEAR, alone, play, real, script
from regard.testing.pictures import BY_TOKEN, IMAGE, other, together
from regard.testing.pictures import alone as one_of
from regard.testing.zoo import build

MARK = {"marked": lambda ids: ids % 3 == 0}


@predicate("marked")
def marked_see_marked(at: Coordinates) -> torch.Tensor:
    """Marked tokens see marked ones and themselves, the others all."""
    return (at.q_role("marked") <= 0) | (at.k_role("marked") > 0) | (at.q == at.k)


def by_hand(feeds, marked):
    """The same for explicit attention, told [B, seen] which tokens are marked."""

    def change(layer, quantity, x, seen):
        if quantity != "scores":
            return x
        n, m = x.shape[-2:]
        own = torch.arange(m - n, m)[:, None] == torch.arange(m)
        label = marked[:, :m]
        seen = ~label[:, m - n :, None] | label[:, None] | own
        return x.masked_fill(~seen[:, None], -torch.inf)

    return change


@pytest.mark.parametrize("short", [256, 1], ids=["dense", "over blocks"])
@pytest.mark.parametrize("pads", [(0, 0), (0, 6)], ids=str)
def test_a_mask_of_roles(pads, short, monkeypatch):
    monkeypatch.setattr(masking, "SHORT", short)
    model, _ = build("llama")
    feeds = script((20, 1, 1, 5, 1), pads)
    tape = play(model, None, feeds, [marked_see_marked()], roles=MARK)
    marked = torch.cat([feed["input_ids"] for feed in feeds], 1) % 3 == 0
    assert not torch.equal(*marked)
    assert gap(feeds, tape.outs, hide(model, feeds, change=by_hand(feeds, marked))) <= NEAR
    for row in range(2):
        single = play(model, None, alone(feeds, row), [marked_see_marked()], roles=MARK)
        for step, (a, b) in enumerate(zip(tape.outs, single.outs, strict=True)):
            assert float((a[row][real(feeds, step)[row]] - b[0]).abs().max()) <= NEAR, (row, step)


def test_tokens_whose_ids_are_not_known_have_no_role():
    """The first call gives embeddings and no ids: its tokens are unmarked, those of later calls by their ids."""
    model, _ = build("llama")
    feeds = script((12, 6, 1), (0, 0))
    marked = torch.cat([feed["input_ids"] for feed in feeds], 1) % 3 == 0
    marked[:, :12] = False
    outs, cache = [], DynamicCache()
    with attach(model, marked_see_marked(), roles=MARK), torch.no_grad():
        for step, feed in enumerate(feeds):
            if step == 0:
                ids = feed["input_ids"]
                feed = {**feed, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(ids)}
            outs.append(model(**feed, past_key_values=cache).logits)
    assert gap(feeds, outs, hide(model, feeds, change=by_hand(feeds, marked))) <= NEAR


WAYS = {
    "bare": [],
    "all is kept": [catalog.method("h2o", budget=1.0)],
    "scores are edited": [Edit(Site("scores"), "scale", 1.0)],
    "the image is hidden": [Edit(Site("scores", tower="text", keys="image"), "scale", 0.2)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gemma3mm", "llava"])
def test_images_at_different_places(family, way):
    """Gemma 3 lets the tokens of an image see each other: where they stand differs by row."""
    model, inputs = side_by_side(family)
    assert not torch.equal(*(inputs["input_ids"] == IMAGE))
    found = last(model, inputs, WAYS[way])
    for text in range(2):
        one = one_of(inputs, text)
        wanted = last(model, one, WAYS[way])
        assert float((found[text] - wanted[0]).abs().max()) <= NEAR, text
        if way != "the image is hidden":
            assert float((wanted - last(model, one, None)).abs().max()) <= NEAR, text


def side_by_side(family):
    """Two prompts of one length, the first with two words more after its image, the other with two more before it."""
    model, one = build(family)
    first = {name: torch.cat([x, x[:, -2:]], 1) if name in BY_TOKEN else x for name, x in one.items()}
    return model, together([first, other(one)])


def last(model, inputs, methods):
    """[B, V] logits of the newest token."""
    with attach(model, methods), torch.no_grad():
        return model(**inputs, use_cache=True).logits[:, -1]
