"""Places in the text and positions of the model: padding anywhere, layers without rotation, shared positions.

The oracle of a moved key is the layer itself: StreamingLLM's sinks see only each other, so at any layer their keys at
other positions are those that the plain model gives when it reads the sinks alone there.
"""

import gc
import weakref

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from regard import catalog
from regard.attaching import rotary
from regard.attaching.attachment import attach
from regard.attaching.store import load_cache, save_cache
from regard.core import Edit, NeverFired, Observer, Site, Unsupported
from regard.testing.cache.script import GAPS, NEAR, alone, play, real, script
from regard.testing.zoo import TEXT, build

SINKS, WINDOW, FED = 3, 5, 30
ROPES = {
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
}  # fmt: skip
HALF = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a key's length


def sinks_after(model, steps=(FED - 3, 1, 1, 1)):
    """Keys [1, G, SINKS, D] of the sinks by layer after the script, and how far they were moved."""
    feeds, cache = script(steps, pads=(0,)), DynamicCache()
    with attach(model, "streaming_llm", sinks=SINKS, window=WINDOW) as attached, torch.no_grad():
        for feed in feeds:
            model(**feed, past_key_values=cache)
        layers = attached.context.caches.layers
    gone = sum(steps) - WINDOW - 1 - SINKS  # the last step read the window and its own token
    full = {i: layer.groups[0].k()[:, :, :SINKS] for i, layer in enumerate(layers) if layer.window is None}
    return feeds[0]["input_ids"][:, :SINKS], full, gone


def own_keys(model, tokens, first):
    """Keys of every layer when the model reads these tokens alone, from this position on."""
    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=tokens, position_ids=first + torch.arange(tokens.shape[1])[None], past_key_values=cache
        )
    return [layer.keys for layer in cache.layers]


def off(result, expected):
    """The largest difference in parts of a key's length, over the layers that do not slide."""
    return max(
        float(((k - expected[i]).float().norm(dim=-1) / expected[i].float().norm(dim=-1)).max())
        for i, k in result.items()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox", "phi", "smollm3", "gptoss"])
def test_moved_keys_are_the_layers_own(family):
    model, _ = build(family)
    tokens, keys, gone = sinks_after(model)
    assert off(keys, own_keys(model, tokens, gone)) <= NEAR
    assert off(keys, own_keys(model, tokens, 0)) > 1e-2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rope", ROPES)
def test_moved_keys_by_rope_type_in_half_precision(rope, dtype):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**TEXT, rope_parameters={"rope_theta": 1e4, **ROPES[rope]})
    model = tf.LlamaForCausalLM(config).eval().to(dtype)
    tokens, keys, gone = sinks_after(model)
    assert off(keys, own_keys(model, tokens, gone)) <= HALF[dtype]


def test_a_layer_without_positions_is_left_as_it_is():
    model, _ = build("smollm3")
    tokens, keys, gone = sinks_after(model)
    near, far = own_keys(model, tokens, 0), own_keys(model, tokens, gone)
    # layer 1 does not rotate: its keys depend on their position through layer 0 alone, and the sinks' not at all
    assert float((near[1] - far[1]).abs().max()) <= NEAR
    assert float((keys[1] - near[1]).abs().max()) <= NEAR
    assert float((keys[2] - near[2]).abs().max()) > 1e-2


def test_a_norm_after_the_rotation_is_refused_by_name():
    model, inputs = build("hunyuan")
    with (
        pytest.raises(Unsupported, match="turning the keys of HunYuanDenseV1Attention"),
        attach(model, "streaming_llm", sinks=2, window=3),
    ):
        model.generate(**inputs, max_new_tokens=3)
    with attach(model, "streaming_llm", sinks=2, window=3, positions="text"):
        model.generate(**inputs, max_new_tokens=3)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AttributeError])
def test_a_layer_that_cannot_be_asked_is_refused_with_its_reason(error, monkeypatch):
    """Whatever its code raises when it is asked by itself: the name of the layer, and that error."""

    def asked_by_itself(attention, question, ask, tables):
        def fails(at, x):
            raise error("it is not asked so")

        return prove(attention, question, fails, tables)

    prove = rotary.prove
    monkeypatch.setattr(rotary, "prove", asked_by_itself)
    model, inputs = build("llama")
    wanted = "LlamaAttention could not be asked for its keys at other positions: it is not asked so"
    with pytest.raises(Unsupported, match=wanted), attach(model, "streaming_llm", sinks=2, window=3):
        model.generate(**inputs, max_new_tokens=3)


def test_a_layer_that_is_refused_is_asked_once(monkeypatch):
    """TokenSelect goes on without rotation where keys cannot be turned: that is found out once, not at every step."""
    model, inputs = build("hunyuan")
    asked, prove = [], rotary.prove

    def counted(attention, *rest):
        asked.append(attention)
        return prove(attention, *rest)

    monkeypatch.setattr(rotary, "prove", counted)
    with attach(model, "tokenselect", budget=4):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert len(asked) == len(set(asked)) == 3


def test_asking_a_layer_for_its_keys_calls_no_hook_of_the_users():
    model, inputs = build("llama")
    calls = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda m, a, out: calls.append(out.shape)
    )
    with attach(model, "streaming_llm", sinks=2, window=3), torch.no_grad():
        model(**inputs)
    hook.remove()
    assert calls == [(1, 12, 16)]


def test_tables_live_as_long_as_they_are_known():
    """A table that is recognised by its place in memory keeps that place."""
    model, inputs = build("llama")
    with attach(model, "streaming_llm", sinks=2, window=3) as attached, torch.no_grad():
        model(**inputs)
        watched = attached.context.rotary
        known = [weakref.ref(call.tables[0]) for call in watched.calls]
        watched.tables.clear()
        gc.collect()
        assert known and all(ref() is not None for ref in known)


# -- padding in the middle


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "tokenselect"])
def test_a_hole_in_the_mask_moves_nothing(name):
    """Nothing is evicted: the question of the second turn is answered as the model answers it."""
    model, _ = build("llama")
    feeds = script((12, 8), pads=(0, 0), gaps={1: ((3, 0), (0, 0))})
    settings = dict(sinks=2, window=1 << 20) if name == "streaming_llm" else dict(budget=1 << 20)
    plain = play(model, None, feeds).outs
    outs = play(model, catalog.method(name, **settings), feeds).outs
    assert (
        max(float((a - b)[real(feeds, i)].abs().max()) for i, (a, b) in enumerate(zip(outs, plain))) <= NEAR
    )


def test_recycled_attention_decides_by_row():
    """The dynamic variant compares queries: each text by itself."""
    model, _ = build("llama")
    method = catalog.method("recycled_attention", budget=8, stride=50, similarity=0.1)
    feeds = script((20, *[1] * 8))
    batch = play(model, method, feeds)
    # steps in which one text of the batch reads everything and another does not
    alive = [read[1].alive & feed["attention_mask"].bool()[:, None] for read, feed in zip(batch.reads, feeds)]
    less = [x.sum((1, 2)) < 2 * feed["attention_mask"].sum(-1) for x, feed in zip(alive, feeds)]
    assert any(bool(x[:2].any()) and not bool(x[:2].all()) for x in less)
    for row in range(3):
        single = play(model, method, alone(feeds, row))
        for step, (a, b) in enumerate(zip(batch.outs, single.outs, strict=True)):
            assert float((a[row][real(feeds, step)[row]] - b[0]).abs().max()) <= NEAR, (row, step)


def test_an_edit_of_the_first_token_meets_it_in_every_text():
    model, _ = build("llama")
    edit = Edit(Site("scores", keys=0), "block")
    feeds = script((9, 1), pads=(0, 4))
    batch = play(model, None, feeds, [edit])
    for row in range(2):
        single = play(model, None, alone(feeds, row), [edit])
        for step in range(2):
            wrong = batch.outs[step][row][real(feeds, step)[row]] - single.outs[step][0]
            # the first query, which sees itself alone, is left with nothing
            assert float(wrong[1:].abs().max() if step == 0 else wrong.abs().max()) <= NEAR


def test_an_edit_of_a_token_that_no_text_has_never_fires():
    model, _ = build("llama")
    feeds = script((9,), pads=(2, 4))
    with pytest.raises(NeverFired):
        play(model, None, feeds, [Edit(Site(keys=7), "scale", 0.5)])


@pytest.mark.parametrize("statistic", ["last_row", "received", "top1", "z"])
def test_observers_of_a_padded_batch_say_what_the_text_alone_says(statistic):
    model, _ = build("llama")
    feeds = script(gaps=GAPS)
    observer = Observer(statistic, Site(rows=(0, -1)) if statistic != "last_row" else Site())

    def records(feeds):
        with attach(model, observer) as attached, torch.no_grad():
            cache = DynamicCache()
            for feed in feeds:
                model(**feed, past_key_values=cache)
        return attached.records[statistic]

    batch = records(feeds)
    for row in range(3):
        for (_, step, a), (_, _, b) in zip(batch, records(alone(feeds, row)), strict=True):
            a, text = a[row], feeds[step]["attention_mask"][row].bool()
            a = a[..., text] if statistic in ("last_row", "received") else a[:, : b.shape[2]]
            assert float((a - b[0]).abs().max()) <= NEAR, (row, step)


def test_rows_that_a_text_of_a_batch_does_not_have_are_said_to_be_none():
    model, _ = build("llama")
    observers = [Observer(name, Site(rows=(0, 3))) for name in ("top1", "z")]
    with attach(model, observers) as attached, torch.no_grad():
        model(**script((5,), pads=(0, 2))[0])  # of five tokens, and of three
    for (_, _, top), (_, _, z) in zip(attached.records["top1"], attached.records["z"], strict=True):
        assert top.dtype == torch.long
        assert (top[0] >= 0).all() and (top[1, :, 0] == 0).all() and (top[1, :, 1] == -1).all()
        assert z[0].isfinite().all() and z[1, :, 0].isfinite().all() and z[1, :, 1].isnan().all()


def test_a_row_is_written_down_by_the_forward_that_has_it():
    model, _ = build("llama")
    layers = model.config.num_hidden_layers
    observers = [Observer("z", Site(rows=0), name="first"), Observer("z", Site(rows=4), name="fifth")]
    with attach(model, observers) as attached:
        cache = DynamicCache()
        for feed in script((9, 1, 5, 1)):
            with torch.no_grad():
                model(**feed, past_key_values=cache)
    steps = {name: [step for _, step, _ in records] for name, records in attached.records.items()}
    assert steps == {
        "first": [s for s in range(4) for _ in range(layers)],
        "fifth": [0] * layers + [2] * layers,
    }


# -- tokens that share positions


def test_sinks_of_a_model_with_images_stay_before_the_window():
    """Qwen2.5-VL: 25 tokens, of which the 16 of an image take 4 positions: the sinks move by 7, not by 19."""
    model, inputs = build("qwen25vl")
    text = torch.randint(3, 118, (1, 25 - inputs["input_ids"].shape[1]))
    extra = dict(
        input_ids=torch.cat([inputs["input_ids"], text], 1),
        attention_mask=torch.ones(1, 25, dtype=torch.long),
        mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(text)], 1),
    )
    inputs, moved = {**inputs, **extra}, []
    page = catalog.get("streaming_llm")
    method = catalog.method("streaming_llm", sinks=2, window=4)

    def shift(view, slots, cfg):
        by = page.shift(view, slots, cfg)
        if by is not None and view.layer == 0:
            moved.append((by.flatten().tolist(), view.position().flatten().tolist()))
        return by

    watched = catalog.method("streaming_llm", sinks=2, window=4)
    watched = type(method)(**{**vars(watched), "page": page.__class__(**{**vars(page), "shift": shift})})
    with attach(model, watched), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    by, positions = moved[0]
    assert by == [7, 7]
    assert [p + d for p, d in zip(positions, by)] == [7, 8]
    assert positions[2:] == [9, 10, 11, 12, 13]


def test_longheads_refuses_tokens_that_share_positions():
    model, inputs = build("qwen25vl")
    with (
        pytest.raises(Unsupported, match="shared positions"),
        attach(model, "longheads", chunk=2, chunks=3),
        torch.no_grad(),
    ):
        model(**inputs)


def test_positions_unknown_before_the_attachment_are_counted_or_refused():
    """Text fed before counts back from what is known; a model whose tokens share positions does not count."""
    model, _ = build("llama")
    feeds = script((12, 6, 1), pads=(0, 4))

    def run(attached_from):
        cache, outs = DynamicCache(), []
        for feed in feeds[:attached_from]:
            model(**feed, past_key_values=cache)
        with attach(model, "streaming_llm", sinks=2, window=5):
            outs = [model(**feed, past_key_values=cache).logits for feed in feeds[attached_from:]]
        return outs[-1]

    with torch.no_grad():
        # evicted at once or a step later: the last step reads the same
        assert float((run(0) - run(1)).abs().max()) > 0
        late = run(1)
    assert late.isfinite().all()


def test_a_saved_cache_keeps_positions_and_labels(tmp_path):
    model, _ = build("llama")
    feeds, rule = script((14, 1, 1, 1), pads=(0, 5)), {"marked": lambda t: t % 3 == 0}
    methods = [catalog.method("streaming_llm", sinks=2, window=5), Edit(Site(keys="marked"), "scale", 0.5)]

    def run(save):
        cache = DynamicCache()
        for i, feed in enumerate(feeds):
            if i == 2 and save:
                save_cache(cache, tmp_path / "cache.safetensors")
                cache = load_cache(tmp_path / "cache.safetensors")
            with attach(model, methods, roles=rule), torch.no_grad():
                out = model(**feed, past_key_values=cache).logits
        return out

    assert torch.equal(run(True), run(False))
