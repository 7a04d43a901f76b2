"""KVzip: what a second reading leaves as it was, what it is refused, and when it is read."""

import pytest
import torch

from regard import Observer, Site, attach, catalog
from regard.core import Unsupported
from regard.core.mask import window
from regard.methods.caches import kvzip
from regard.ops.rereading import Rereading
from regard.testing.cache import small
from regard.testing.cache.script import script
from regard.testing.zoo import build

METHOD = catalog.method("kvzip", **small(catalog.get("kvzip")))
LONG = METHOD.with_settings(chunk=50)


class Letters:
    """A tokenizer: each letter is a token."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def passes(model, attached_to, feeds, **settings):
    """Forwards of the decoder within those of the model."""
    count = []
    hook = model.get_decoder().register_forward_pre_hook(lambda *given: count.append(1))
    with attach(model, attached_to, **settings), torch.no_grad():
        cache, seen = None, []
        for feed in feeds:
            cache = model(**feed, past_key_values=cache, use_cache=True).past_key_values
            seen.append(len(count))
            count.clear()
    hook.remove()
    return seen


def test_a_prompt_is_read_again_once_for_each_chunk_and_a_step_is_not():
    model, _ = build("llama")
    feeds = script((20, 1, 1, 5, 1), pads=(0, 0))
    # 20 tokens in chunks of 7; then what was generated and the question, 7 together
    assert passes(model, METHOD, feeds) == [1 + 3, 1, 1, 1 + 1, 1]


def test_words_need_a_tokenizer_and_are_said_with_it():
    model, _ = build("llama")
    feeds = script((20,), pads=(0,))
    with pytest.raises(Unsupported, match=r"words of its own, .*tokenizer=tokenizer"), attach(model, "kvzip"):
        pass
    assert passes(model, "kvzip", feeds, tokenizer=Letters()) == [2]
    assert "_regard" not in vars(model) and not model.get_decoder()._forward_hooks


def test_nothing_of_the_second_reading_is_left_where_everything_stays():
    """With room for all, the cache, its positions and later logits are those without the method."""
    model, _ = build("llama")
    feeds = script((20, 1, 5, 1), pads=(0, 0))
    found = {}
    for name, method in (("own", None), ("kvzip", LONG.with_settings(budget=1.0))):
        cache, outs = None, []
        with attach(model, method) as attached, torch.no_grad():
            for feed in feeds:
                out = model(**feed, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outs.append(out.logits)
        layers = [(layer.seen, layer.keys, layer.values) for layer in cache.layers]
        found[name] = outs, layers, attached.stored()
    for a, b in zip(found["own"][0], found["kvzip"][0], strict=True):
        assert float((a - b).abs().max()) < 2e-5
    for (n, k, v), (m, x, y) in zip(found["own"][1], found["kvzip"][1], strict=True):
        assert n == m and torch.allclose(k, x, atol=1e-5) and torch.allclose(v, y, atol=1e-5)
    assert found["own"][2] == found["kvzip"][2]


def test_observers_write_down_the_models_own_pass_alone():
    model, _ = build("llama")
    feeds, rows = script((20, 1), pads=(0,)), {}
    sites = {"z": Site("z"), "resid": Site("resid_post")}
    for name, methods in (("own", []), ("beside", [LONG.with_settings(budget=1.0)])):
        observers = [Observer("value", site, name=what) for what, site in sites.items()]
        with attach(model, [*methods, *observers]) as attached, torch.no_grad():
            cache = None
            for feed in feeds:
                cache = model(**feed, past_key_values=cache, use_cache=True).past_key_values
        rows[name] = attached.records
    for what in sites:
        assert [r[:2] for r in rows["own"][what]] == [r[:2] for r in rows["beside"][what]], what
        for (*_, a), (*_, b) in zip(rows["own"][what], rows["beside"][what], strict=True):
            assert float((a - b).abs().max()) < 2e-5


def test_a_mask_beside_it_narrows_the_second_reading_too():
    model, _ = build("llama")
    feeds, held = script((20,), pads=(0,)), []
    for masks in ([], [window(6)]):
        with attach(model, [LONG, *masks]) as attached, torch.no_grad():
            model(**feeds[0], use_cache=True)
            held.append([group.table().tolist() for layer in attached.cache.layers for group in layer.groups])
    assert held[0] != held[1]


def test_what_it_cannot_read_again_is_refused():
    model, _ = build("llava")
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, 7, 9]])
    with attach(model, LONG) as attached:
        attached.context.step.labels = {"image": ids == image}
        with pytest.raises(Unsupported, match="kvzip asks for the prompt again as text"):
            attached.actors[0].rereader._prompt({}, ids)
    with pytest.raises(ValueError, match="chunk >= 1"):
        kvzip.Config(chunk=0)
    with pytest.raises(ValueError, match="lead >= 0"):
        Rereading("a", "b", "c", 5, -1)


def test_embeddings_are_repeated_as_embeddings():
    """A prompt that is given as embeddings holds the same tokens as its ids."""
    model, _ = build("llama")
    feed, held = script((20,), pads=(0,))[0], []
    embedded = {**feed, "inputs_embeds": model.get_input_embeddings()(feed["input_ids"])}
    embedded.pop("input_ids")
    for given in (feed, embedded):
        with attach(model, LONG) as attached, torch.no_grad():
            model(**given, use_cache=True)
            held.append([group.table().tolist() for layer in attached.cache.layers for group in layer.groups])
    assert held[0] == held[1]
