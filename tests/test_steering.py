"""Steering on models: streams follow the cache, roles and prompts are checked, and two decode controls are refused."""

from dataclasses import dataclass

import pytest
import torch

from regard.attaching.attachment import attach
from regard.core import Card, Edit, Method, NeverFired, Observer, Site, Unreachable, Unsupported
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Stream, contrasted
from regard.testing.pictures import alone, batch, said
from regard.testing.zoo import build

CARD = Card(title="test", paper="none", year=2026, idea="", neutral={"alpha": 0.0})


@dataclass(frozen=True)
class Config:
    alpha: float = 2.0
    seed: int = 0


def method(needs_image=True, **parts):
    return Method("mine", SteeringPage(config=Config, card=CARD, needs_image=needs_image, **parts), Config())


def mixed(at, logits, cfg):
    return contrasted(logits["main"], logits["text"], cfg.alpha, 0.0)


TEXT = dict(streams=lambda cfg: (Stream("text", hide="image"),), logits=mixed)


@torch.no_grad()
def test_a_stream_with_a_cache_says_what_it_says_without():
    """Token by token with caches = each prefix read anew."""
    model, inputs = build("llava")
    with attach(model, method(**TEXT)):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        ids = out.sequences
        for t, wanted in enumerate(out.logits):
            prefix = ids[:, : inputs["input_ids"].shape[1] + t]
            again = model(input_ids=prefix, pixel_values=inputs["pixel_values"], use_cache=False).logits[
                :, -1
            ]
            assert (again - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_hidden_images_are_images_that_do_not_matter():
    """A stream that hides the image says the same whatever is on it, and the main pass does not."""
    model, inputs = build("llava")
    only = method(streams=TEXT["streams"], logits=lambda at, logits, cfg: logits["text"])
    found = []
    for pixels in (inputs["pixel_values"], inputs["pixel_values"].flip(-1) + 1):
        with attach(model, only):
            found.append(model(**{**inputs, "pixel_values": pixels}).logits[:, -1])
    assert (found[0] - found[1]).abs().max() < 1e-5


@torch.no_grad()
def test_streams_follow_beams_and_copies():
    import copy

    model, inputs = build("llava")
    with attach(model, method(**TEXT)):
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
        out = model(**inputs, use_cache=True)
        fork = copy.deepcopy(out.past_key_values)
        token = torch.tensor([[7]])
        one = model(input_ids=token, past_key_values=out.past_key_values).logits
        other = model(input_ids=token, past_key_values=fork).logits
    assert beams.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(one, other)


@torch.no_grad()
def test_observers_write_down_the_main_pass_alone():
    model, inputs = build("llava")
    residual = Observer("value", Site("resid_post"), name="residual")
    with attach(model, [method(**TEXT), Observer("last_row"), residual]) as attached:
        model(**inputs)
    layers = [layer for layer, _, _ in attached.records["last_row"]]
    assert len(layers) == len({*layers}) + 3  # three layers of the decoder, three of the tower
    assert [layer for layer, _, _ in attached.records["residual"]] == [0, 1, 2]


def test_refusals():
    text, _ = build("llama")
    with pytest.raises(Unreachable, match="image_token_id"):
        attach(text, method(**TEXT))
    model, inputs = build("llava")
    with pytest.raises(Unsupported, match="one decode control at a time"):
        attach(model, [method(**TEXT), method(**TEXT)])
    with pytest.raises(ValueError, match="holds visual tokens"), attach(model, method(**TEXT)):
        model(input_ids=torch.tensor([[1, 5, 6]]))
    other = method(False, streams=lambda cfg: (Stream("text", hide="document"),), logits=mixed)
    with pytest.raises(KeyError, match="no role is called 'document'"), attach(model, other):
        model(**inputs)
    never = method(weights=lambda at, w, cfg: w, acts=lambda at, cfg: False)
    with pytest.raises(NeverFired, match="never acted"), attach(model, never):
        model(**inputs)
    with pytest.raises(ValueError, match="names of their own"):
        attach(model, method(streams=lambda cfg: (Stream("main"),), logits=mixed))
    away = Method("away", SteeringPage(config=Config, card=CARD, acts_on_models=False), Config())
    with pytest.raises(Unsupported, match="attach does not reach"):
        attach(model, away)


def by_text(**parts):
    """Steered by what was prepared: the last token's state of each layer, [B, layers, d]."""

    def prepare(runs, at, cfg):
        return runs["image"]["resid_post"].transpose(0, 1)

    def steer(at, x, cfg):
        return x + at.memory[:, at.layer, None] if at.phase == "decode" else x

    record = lambda cfg: (Stream("image", records=("resid_post",), once=True),)  # noqa: E731
    return method(streams=record, **{"prepare": prepare, "layer_edits": {"resid_post": steer}, **parts})


@torch.no_grad()
@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1]])
def test_memory_follows_the_rows_of_a_cache(rows):
    """A text goes on as it would have, wherever its row is put."""
    model, inputs = batch("llava")
    token, mask = torch.tensor([[5], [9]]), torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    found = []
    for order in ([0, 1], rows):
        with attach(model, by_text()):
            cache = model(**inputs, use_cache=True).past_key_values
            (cache.reorder_cache if len(rows) > 1 else cache.batch_select_indices)(torch.tensor(order))
            out = model(input_ids=token[order], attention_mask=mask[order], past_key_values=cache)
            found.append(out.logits[:, -1])
    plain, moved = found
    assert (plain[0] - plain[1]).abs().max() > 1e-2
    assert (moved - plain[rows]).abs().max() < 1e-5


@torch.no_grad()
def test_memory_that_does_not_lead_with_the_batch_is_refused():
    model, inputs = batch("llava")
    other = by_text(prepare=lambda runs, at, cfg: torch.zeros(3, 2), layer_edits={})
    with pytest.raises(ValueError, match="leads with the batch"), attach(model, other):
        model(**inputs, use_cache=True)


@torch.no_grad()
def test_a_cache_that_began_without_the_method():
    model, inputs = build("llava")
    with attach(model, None):
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="began without the stream"), attach(model, method(**TEXT)):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_padding_on_the_right():
    """The newest token of each text is steered, wherever padding lies."""
    model, inputs = batch("llava")
    right = {**inputs}
    for name in ("input_ids", "attention_mask"):
        shifts = (inputs["attention_mask"] == 0).sum(1).tolist()
        right[name] = torch.stack([row.roll(-n) for n, row in zip(shifts, inputs[name], strict=True)])
    with attach(model, method(**TEXT)):
        left = model(**inputs).logits[:, -1]
        out = model(**right).logits
    last = right["attention_mask"].sum(1) - 1
    assert (out[torch.arange(2), last] - left).abs().max() < 1e-4
    assert torch.isfinite(said(model, inputs, 1)).all()


@torch.no_grad()
def test_two_methods_keep_what_each_of_them_prepared():
    model, inputs = build("llava")
    seen = {"a": [], "b": []}

    def noting(name):
        def z(at, z, cfg):
            seen[name].append((at.memory, at.notes.setdefault("who", name)))
            return z

        page = method(prepare=lambda runs, at, cfg: name, z=z).page
        return Method(name, page, Config())

    with attach(model, [noting("a"), noting("b")]):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert all(found and {*found} == {(name, name)} for name, found in seen.items())


def test_two_that_change_attention_weights_are_refused():
    model, _ = build("llava")
    one, other = method(weights=lambda at, w, cfg: w), method(scores=lambda at, s, cfg: s)
    edit = Edit(Site("weights", layers=0), "zero")
    for both in ([one, other], [edit, one]):
        with pytest.raises(Unsupported, match="changes attention weights at a time"):
            attach(model, both)
    attach(model, [Edit(Site("mlp", layers=0), "zero"), one])


@torch.no_grad()
def test_streams_read_what_was_given_by_place():
    model, inputs = build("llama")
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    same = method(False, streams=lambda cfg: (Stream("same"),), logits=lambda at, logits, cfg: logits["same"])
    wanted = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert (wanted - model(input_ids=ids).logits[:, -1]).abs().max() > 1e-3
    with attach(model, same):
        assert torch.allclose(model(ids, mask).logits[:, -1], wanted, atol=1e-5)


@torch.no_grad()
def test_a_search_gives_what_generate_is_asked_for_or_refuses():
    model, both = batch("llava")
    inputs, how = alone(both, 0), dict(max_new_tokens=3, pad_token_id=0)
    first = model(**inputs).logits[:, -1]
    with attach(model, "opera", beams=2, alpha=0.0):
        out = model.generate(**inputs, **how, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(out.sequences, model.generate(**inputs, **how, num_beams=2))
        assert torch.allclose(out.logits[0], first, atol=1e-5)
        with pytest.raises(ValueError, match="takes its beams from its settings"):
            model.generate(**inputs, **how, num_beams=3)
        for unread in (
            dict(min_new_tokens=2),
            dict(logits_processor=[lambda ids, x: x]),
            dict(output_scores=True),
        ):
            with pytest.raises(Unsupported, match="reads no"):
                model.generate(**inputs, **how, **unread)


@torch.no_grad()
def test_an_edit_of_outputs_is_not_lost_beside_changed_weights():
    model, inputs = build("llava")
    rolled = method(weights=lambda at, w, cfg: w.roll(1, -1), acts=lambda at, cfg: at.layer == 2)
    zero = Edit(Site("z", layers=2), "zero")
    found = []
    for methods in (zero, [zero, rolled], [rolled, zero], rolled):
        with attach(model, methods):
            found.append(model(**inputs).logits[:, -1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[3], atol=1e-4)
