"""Fewer visual tokens on models: bad answers and bad prompts are refused by name, and later turns go on."""

from dataclasses import dataclass

import pytest
import torch

from regard.attaching.attachment import attach
from regard.attaching.reduction import Reduction
from regard.attaching.towers import Layout, border, padding_of
from regard.core import Card, Edit, Method, NeverFired, Observer, Site, Unreachable, Unsupported
from regard.kinds.tokens import TokensPage
from regard.ops.images import Reduced, count_of, highest
from regard.testing.pictures import FAMILIES, batch, two_images
from regard.testing.zoo import build

CARD = Card(title="longest", paper="none", year=2026, idea="", neutral={"keep": 1.0})


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25


def longest(images, cfg):
    return [Reduced(highest(i.features.norm(dim=-1), count_of(cfg.keep, i.tokens))) for i in images]


def method(before=longest, after=None, keep=0.25):
    return Method("longest", TokensPage(config=Config, card=CARD, before=before, after=after), Config(keep))


@torch.no_grad()
def turns(model, inputs, how):
    """Logits of a prompt, two steps, and a question of three tokens after them."""
    found = []
    with attach(model, Reduction(method(), how)) as attached:
        cache, rows, mask = None, len(inputs["input_ids"]), inputs["attention_mask"]
        for new in (inputs, *(dict(input_ids=torch.full((rows, n), 5)) for n in (1, 1, 3))):
            if cache is not None:
                mask = torch.cat([mask, torch.ones_like(new["input_ids"])], 1)
                new = {**new, "attention_mask": mask, "past_key_values": cache}
            out = model(**new, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1])
        stored = attached.stored()
    return torch.stack(found), stored


@pytest.mark.parametrize("family", ["llava", "gemma3mm", "smolvlm"])
def test_several_turns_in_a_padded_batch(family):
    model, inputs = batch(family)
    hidden, whole = turns(model, inputs, "mask")
    removed, left = turns(model, inputs, "remove")
    assert (hidden - removed).abs().max() < 1e-5
    assert sum(map(sum, left)) < sum(map(sum, whole))  # what left is not stored


def test_texts_that_keep_different_numbers():
    """The text that keeps fewer carries what it dropped along, hidden."""
    model, inputs = batch("llava")

    def uneven(images, cfg):
        return [Reduced(highest(i.features[:, 0], 3 if float(i.features[0, 0]) > 0 else 7)) for i in images]

    found = []
    for how in ("mask", "remove"):
        reduction = Reduction(method(uneven), how)
        with torch.no_grad(), attach(model, reduction):
            found.append(model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True,
                                        do_sample=False, pad_token_id=0))  # fmt: skip
    assert {row[-1] for row in reduction.kept} == {3, 7}
    gap = max((a - b).abs().max().item() for a, b in zip(*(f.logits for f in found), strict=True))
    assert gap < 1e-5


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ([3, 1], "ascending"),
        ([1, 1], "ascending"),
        ([0, 99], "still there"),
        ([], "a visual token or more"),
    ],
)
def test_bad_answers_of_a_page(answer, rule):
    model, inputs = build("llava")
    page = method(lambda images, cfg: [Reduced(torch.tensor(answer, dtype=torch.long)) for _ in images])
    with pytest.raises(ValueError, match=rule), attach(model, page):
        model(**inputs)


def test_dropped_tokens_do_not_come_back():
    model, inputs = build("llava")
    page = method(None, lambda view, cfg: torch.arange(4) if view.layer == 0 else torch.arange(5))
    with pytest.raises(ValueError, match="still there"), attach(model, page):
        model(**inputs)


def test_prompts_and_models_that_it_cannot_act_on():
    text, _ = build("llama")
    with pytest.raises(Unreachable, match="image_token_id"):
        attach(text, method())
    model, inputs = build("llava")
    with pytest.raises(NeverFired, match="no prompt with an image"), attach(model, method()):
        model(input_ids=torch.tensor([[1, 5, 6]]))
    with pytest.raises(Unsupported, match="labels"), attach(model, method()):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="a visual token or more"):
        count_of(0, 16)
    with pytest.raises(Unsupported, match="one tokens method"):
        attach(model, [method(), method(keep=0.5)])


def test_removal_stands_alone_and_hiding_beside_edits():
    model, inputs = build("llava")
    edit = Edit(Site("z", layers=1, heads=0, tower="text"), "zero")
    with pytest.raises(Unsupported, match='how="mask"'):
        attach(model, [method(), edit])
    with (
        torch.no_grad(),
        attach(model, [Reduction(method(), "mask"), edit, Observer("last_row")]) as attached,
    ):
        model(**inputs)
    assert attached.receipts()[str(edit)] == 1 and attached.records["last_row"]


def test_nothing_stays_behind():
    model, inputs = build("qwen3vl")
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, method()):
            model(**inputs)
        assert torch.equal(plain, model(**inputs).logits)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


def test_padding_of_a_picture():
    pixels = torch.rand(3, 32, 32)
    pixels[:, :8] = 0.5
    share = padding_of(pixels, Layout(0, torch.arange(16)[:, None], (4, 4)))
    assert share.view(4, 4)[0].tolist() == [1.0] * 4 and share.view(4, 4)[1:].sum() == 0
    assert padding_of(torch.rand(3, 32, 32), Layout(0, torch.arange(16)[:, None], (4, 4))) is None
    assert border(torch.tensor([True, True, False, True, False, True])).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_the_tower_are_those_of_the_patches(family):
    """A picture that differs in one token's patches alone differs in that token's members: rows of the layout."""
    model, inputs = two_images(family)
    seen = []
    page = method(lambda images, cfg: [seen.append(i) or Reduced(torch.arange(i.tokens)) for i in images])
    with torch.no_grad(), attach(model, page):
        model(**inputs)
        shares = [image.received(-1) for image in seen]
    assert len(seen) == 2 and all(s.shape[1] == i.tokens for s, i in zip(shares, seen, strict=True))
    assert not torch.equal(*shares) and all(i.grid is None or i.grid[0] * i.grid[1] == i.tokens for i in seen)
