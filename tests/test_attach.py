"""attach: exact undo, no drift, refusals by name, gradients, two caches, and what the model's own paths give."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.lazy_mask import Standins
from regard.attaching.ledger import LedgerLayer
from regard.attaching.slots import SLACK
from regard.core import Edit, NeverFired, Observer, Site, Unreachable, Unsupported
from regard.testing.cache.script import NEAR, real, script
from regard.testing.tiny import text
from regard.testing.zoo import UNREACHED, ZOO, build, ids, logits, sharpened

REACHED = [name for name in ZOO if name not in UNREACHED]
EXPLICIT = ("gemma2", "gptoss")  # their own default is eager attention
WRITERS = [n for n in REACHED if n not in ("bert", "vit", "clip")]  # those that generate
STREAM = catalog.method("streaming_llm", budget=8)


def state(model):
    """All that an attachment may touch, in a form that compares."""
    modules = dict(model.named_modules())
    return {
        "implementation": {
            n: m.config._attn_implementation_internal
            for n, m in modules.items()
            if isinstance(m, PreTrainedModel)
        },
        "hooks": {
            n: [list(getattr(m, kind)) for kind in vars(m) if kind.endswith("_hooks")]
            for n, m in modules.items()
        },
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "forward": {n: m.forward.__func__ for n, m in modules.items()},
        "registries": [sorted(x._global_mapping) for x in (AttentionInterface, AttentionMaskInterface)],
        "config": model.config.to_dict(),
    }


def greedy(model, inputs, **settings):
    defaults = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        return model.generate(**inputs, **{**defaults, **settings})


def run(model, inputs, **settings):
    with torch.no_grad():
        return logits(model(**inputs, **settings))


# -- undo


@pytest.mark.parametrize("name", REACHED)
def test_nothing_is_left_behind(name):
    model, inputs = build(name)
    # transformers puts its own capturing hooks on at the first call
    run(model, inputs)
    before = state(model)
    with attach(model):
        run(model, inputs)
    assert state(model) == before


@pytest.mark.parametrize("method", [None, STREAM, Observer("last_row"), Edit(Site(layers=1), "scale", 0.5)])
def test_undo_after_an_exception(method):
    model, inputs = build("llama")
    before = state(model)
    with pytest.raises(ZeroDivisionError), attach(model, method):  # noqa: PT012
        run(model, inputs)
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), attach(model, method):  # before anything ran: no NeverFired on top
        1 / 0  # noqa: B018
    assert state(model) == before


def test_undo_when_entering_fails(monkeypatch):
    model, _ = build("llama")
    before = state(model)
    monkeypatch.setattr(attach, "_hook", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError), attach(model):
        pass
    assert state(model) == before


def test_one_attachment_after_another_and_two_models():
    (a, inputs), (b, _) = build("llama"), build("qwen3")
    before, expected = (state(a), state(b)), run(b, inputs)
    for _ in range(2):
        with attach(a, STREAM):
            greedy(a, inputs)
            with attach(b):
                assert torch.equal(run(b, inputs), expected)
            greedy(a, inputs)
    assert (state(a), state(b)) == before


def test_one_attachment_at_a_time():
    model, inputs = build("llama")
    before = state(model)
    with attach(model) as outer:
        inside = state(model)
        with pytest.raises(Unsupported, match="attached already"), attach(model, STREAM):
            pass
        assert state(model) == inside
        run(model, inputs)
        assert outer.reached()
    assert state(model) == before


def test_an_attachment_that_is_entered_twice():
    model, inputs = build("llama")
    with attach(model, STREAM) as attached:
        with pytest.raises(Unsupported, match="entered already"), attached:
            pass
        run(model, inputs)
        assert attached.stored() == [[8, 8]] * 3  # still attached
    with attached:
        run(model, inputs)


def test_a_cache_belongs_to_one_attachment():
    (model, inputs), (other, _) = build("llama"), build("llama")
    with torch.no_grad(), attach(model, STREAM), attach(other, STREAM):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(Unsupported, match="in use by another attachment"):
            run(other, inputs, past_key_values=cache)
        copied = copy.deepcopy(cache)
        assert torch.equal(
            run(other, inputs, past_key_values=copied), run(model, inputs, past_key_values=cache)
        )


@pytest.mark.parametrize("window_passed", [False, True])
def test_crop_of_a_sliding_layer(window_passed):
    """Tokens can be taken back while the window holds what they hid, or their past is recorded."""
    model, _ = build("mistral")
    text = ids(1, 30)
    with attach(model):
        for record in (True, False):
            cache = DynamicCache(config=model.config)
            run(model, dict(input_ids=text[:, : 20 if window_passed else 2]), past_key_values=cache)
            if record:
                cache.activate_past_recording()
            run(model, dict(input_ids=text[:, :3]), past_key_values=cache)
            if window_passed and not record:
                with pytest.raises(Unsupported, match="activate_past_recording"):
                    cache.crop(-3)
                continue
            cache.crop(-3)
            after = run(model, dict(input_ids=text[:, 3:5]), past_key_values=cache)
            other = DynamicCache(config=model.config)
            run(model, dict(input_ids=text[:, : 20 if window_passed else 2]), past_key_values=other)
            expected = run(model, dict(input_ids=text[:, 3:5]), past_key_values=other)
            assert float((after - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("method", ["retention", "softmax"])
def test_a_state_begun_in_inference_mode(method):
    model, inputs = build("llama")
    outs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with attach(model, method):
            with mode():
                cache = model(**inputs, use_cache=True).past_key_values
            outs.append(run(model, dict(input_ids=inputs["input_ids"][:, :3]), past_key_values=cache))
            outs.append(run(model, dict(input_ids=inputs["input_ids"][:, :1]), past_key_values=cache))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_a_model_of_the_same_configuration_object_is_left_alone():
    model, inputs = build("llama")
    other = type(model)(model.config).eval()
    expected = run(other, inputs)
    with attach(model, STREAM) as attached:
        assert torch.equal(run(other, inputs, use_cache=False), expected)
        assert attached.reached() == {}
        greedy(model, inputs)


def test_importing_changes_nothing():
    assert not [
        n for x in (AttentionInterface, AttentionMaskInterface) for n in x._global_mapping if "regard" in n
    ]


# -- no drift


@pytest.mark.parametrize("name", REACHED)
def test_forward_is_the_models_own(name):
    model, inputs = build(name)
    expected = run(model, inputs)
    with attach(model) as attached:
        result = run(model, inputs)
        assert attached.reached()
    assert float((result - expected).abs().max()) <= (1e-5 if name in EXPLICIT else 0)


@pytest.mark.parametrize("name", WRITERS)
def test_generate_is_the_models_own(name):
    model, inputs = build(name)
    inputs = {k: x for k, x in inputs.items() if not k.startswith("decoder")}
    expected = greedy(model, inputs)
    with attach(model):
        assert torch.equal(greedy(model, inputs), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gptoss", "neox"])
def test_static_cache_is_the_models_own(name, padded):
    model, inputs = build(name)
    if padded:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        inputs = dict(input_ids=ids(2, 12), attention_mask=mask)
    settings = dict(cache_implementation="static", disable_compile=True)
    expected = greedy(model, inputs, **settings)
    with attach(model):
        assert torch.equal(greedy(model, inputs, **settings), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gptoss", "gpt2"])
def test_left_padded_batch_is_the_models_own(name):
    model, _ = build(name)
    tokens, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    inputs = dict(input_ids=tokens, attention_mask=mask)
    expected, written = run(model, inputs), greedy(model, inputs)
    with attach(model):
        assert float((run(model, inputs) - expected)[mask.bool()].abs().max()) <= 1e-5
        assert torch.equal(greedy(model, inputs), written)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "gptoss", "llava"])
def test_gradients_are_the_models_own(name):
    model, inputs = build(name)

    def gradients():
        model.zero_grad()
        logits(model(**inputs)).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with attach(model):
        result = gradients()
    assert expected.keys() == result.keys()
    for label, grad in expected.items():
        torch.testing.assert_close(result[label], grad, rtol=1e-4, atol=1e-6)


def test_training_with_dropout_is_the_models_own():
    model, inputs = build("llama")
    model.config.attention_dropout = 0.5
    model = type(model)(model.config).train()
    outs = []
    for on in (False, True):
        torch.manual_seed(0)
        if on:
            with attach(model):
                outs.append(run(model, inputs))
        else:
            outs.append(run(model, inputs))
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_compiled_is_the_models_own(name):
    model, inputs = build(name)
    expected = run(model, inputs, use_cache=False)
    with attach(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        result = run(compiled, inputs, use_cache=False)
    torch._dynamo.reset()
    assert float((result - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    "method",
    [None, STREAM, catalog.method("h2o", budget=8), catalog.method("retention"),
     Edit(Site("scores", layers=1), "scale", 0.5), Observer("top1")],
    ids=["bare", "streaming_llm", "h2o", "retention", "edit", "observer"],
)  # fmt: skip
def test_compiled_under_a_method(method):
    """A compiled model has breaks where the attachment acts, and answers as it does uncompiled, in generate too."""
    torch.manual_seed(1)
    # a layer like the first is traced again: two, of which an edit takes the second
    model = sharpened(LlamaForCausalLM(LlamaConfig(**text(num_hidden_layers=2))))
    first, *rest = script((20, 1, 3), pads=(0, 6))
    outs = []
    with attach(model, method):
        torch._dynamo.reset()
        for called in (model, torch.compile(model, backend="eager")):
            cache = DynamicCache(config=model.config)
            logits = [run(called, feed, past_key_values=cache)[real([feed], 0)] for feed in (first, *rest)]
            outs.append([*logits, greedy(called, first)])
    torch._dynamo.reset()
    for own, compiled in zip(*outs, strict=True):
        assert torch.equal(own, compiled)


def test_a_model_that_computes_on_its_mask_is_refused_compiled():
    standins = Standins()
    mask = standins.plain(1, 4, 4)
    assert standins.lazy(mask).rule.queries == 4
    with pytest.raises(Unsupported, match="computes on its attention mask"):
        standins.lazy(~mask)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss", "bert", "vit", "gpt2", "neox", "deepseek3"])
def test_output_attentions(name):
    model, inputs = build(name)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        expected = other(**inputs, output_attentions=True)
        with attach(model):
            result = model(**inputs, output_attentions=True)
    assert len(result.attentions) == len(expected.attentions) > 0
    for a, b in zip(result.attentions, expected.attentions):
        seen = torch.ones(a.shape[0], 1, a.shape[2], 1, dtype=torch.bool)
        if name == "bert":
            seen = inputs["attention_mask"][:, None, :, None].bool()
        assert float((a - b).abs().masked_fill(~seen, 0).max()) <= 1e-5
        if name != "gptoss":  # a part of the mass goes to its sinks
            torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))
    assert float((logits(result) - logits(expected)).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_mask_of_the_users_own(kind, name):
    model, inputs = build(name)
    seen = torch.ones(12, 12).tril().bool() & (torch.rand(12, 12) < 0.6) | torch.eye(12).bool()
    low = torch.finfo(torch.float32).min
    additive = torch.where(seen, 0.0, low)[None, None]
    mask = seen[None, None] if kind == "bool" else additive
    positions = torch.arange(12)[None]
    # eager attention adds True as 1
    eager_mask = additive if name == "gemma2" else mask
    expected = run(
        model, dict(input_ids=inputs["input_ids"], attention_mask=eager_mask, position_ids=positions)
    )
    with attach(model):
        result = run(model, dict(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions))
    assert float((result - expected).abs().max()) <= 1e-5


# -- caches


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gptoss"])
@pytest.mark.parametrize("method", [None, Observer("top1")], ids=["bare", "observed"])
def test_sliding_layers_hold_what_the_models_own_hold(name, method):
    model, _ = build(name)
    caches, texts = [DynamicCache(config=model.config) for _ in range(2)], script()
    for feed in texts:
        own = run(model, feed, past_key_values=caches[0])
        with attach(model, method) as attached:
            ours = run(model, feed, past_key_values=caches[1])
        assert float((own - ours)[real([feed], 0)].abs().max()) <= NEAR
        assert attached.bytes_stored() == sum(
            x.numel() * x.element_size() for layer in caches[0].layers for x in (layer.keys, layer.values)
        )
        assert [layer.get_mask_sizes(3) for layer in caches[1].layers] == [
            layer.get_mask_sizes(3) for layer in caches[0].layers
        ]


def test_a_long_text_in_a_sliding_layer():
    model, _ = build("mistral")
    one_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    with attach(model) as attached:
        cache = model(ids(1, 200), use_cache=True).past_key_values
        assert (attached.bytes_stored(), attached.stored()) == (5 * one_token, [[5, 5]] * 3)
        for _ in range(40):
            run(model, dict(input_ids=ids(1, 1)), past_key_values=cache)
            assert attached.stored() == [[5, 5]] * 3
            assert attached.bytes_held() <= (5 + 2 * SLACK) * one_token


def test_two_caches_alternate():
    model, _ = build("llama")
    texts, outs = (ids(1, 15), ids(1, 19)), {}
    for together in (False, True):
        caches = [DynamicCache(), DynamicCache()]
        with attach(model, STREAM):
            outs[together] = [[], []]
            order = (
                [(t, i) for t in range(4) for i in (0, 1)]
                if together
                else [(t, i) for i in (0, 1) for t in range(4)]
            )
            for t, i in order:
                piece = texts[i][:, :-3] if t == 0 else texts[i][:, t - 4 : t - 3 or None]
                outs[together][i].append(run(model, dict(input_ids=piece), past_key_values=caches[i])[:, -1])
    for a, b in zip(outs[False], outs[True], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_roles_belong_to_their_cache():
    model, _ = build("llama")
    results = {}
    for together in (False, True):
        texts = [torch.full((1, 8), 5), torch.full((1, 8), 6)]
        texts[0][0, 2] = texts[1][0, 6] = 100
        caches, seen = [DynamicCache(), DynamicCache()], [[], []]
        edit = Edit(Site("weights", layers=2, keys="marked"), "scale", 0.0)
        with attach(model, edit, roles={"marked": lambda t: t == 100}):
            order = (
                [(t, i) for t in range(2) for i in (0, 1)]
                if together
                else [(t, i) for i in (0, 1) for t in range(2)]
            )
            for t, i in order:
                piece = texts[i][:, :5] if t == 0 else texts[i][:, 5:]
                seen[i].append(run(model, dict(input_ids=piece), past_key_values=caches[i]))
        results[together] = seen
    for a, b in zip(results[False], results[True], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reset_begins_again():
    model, inputs = build("llama")
    cache = DynamicCache()
    with attach(model, STREAM) as attached:
        first = run(model, inputs, past_key_values=cache)
        assert attached.stored() == [[8, 8]] * 3
        cache.reset()
        assert attached.cache.get_seq_length() == 0
        assert torch.equal(run(model, inputs, past_key_values=cache), first)


def test_a_compressed_cache_cannot_go_on_alone():
    model, inputs = build("llama")
    caches = [DynamicCache(), DynamicCache()]
    with attach(model, STREAM):
        for cache in caches:
            run(model, inputs, past_key_values=cache)
    for cache in caches:  # the one used last, and the one before
        with pytest.raises(Unsupported, match="compressed by an attachment that has ended"):
            run(model, dict(input_ids=ids(1, 1)), past_key_values=cache)
    with attach(model, STREAM) as attached:
        run(model, dict(input_ids=ids(1, 1)), past_key_values=caches[0])
        assert attached.stored() == [[8, 8]] * 3


def test_an_untouched_cache_goes_on_alone():
    model, inputs = build("mistral")
    plain, after = DynamicCache(), DynamicCache()
    with attach(model):
        run(model, inputs, past_key_values=after)
    run(model, inputs, past_key_values=plain)
    assert isinstance(after.layers[0], LedgerLayer)
    more = dict(input_ids=ids(1, 3))
    assert (
        float((run(model, more, past_key_values=after) - run(model, more, past_key_values=plain)).abs().max())
        <= 1e-6
    )


def test_a_cache_that_began_without():
    model, inputs = build("llama")
    one, other, more = DynamicCache(), DynamicCache(), dict(input_ids=ids(1, 1))
    run(model, inputs, past_key_values=one)
    with attach(model, STREAM) as attached:
        result = run(model, more, past_key_values=one)
        assert attached.stored() == [[8, 8]] * 3
    run(model, inputs, past_key_values=other)
    assert float((result - run(model, more, past_key_values=other)).abs().max()) <= 1e-6


# -- refusals


@pytest.mark.parametrize("name", UNREACHED)
def test_unreachable_models_are_named(name):
    model, _ = build(name)
    before = state(model)
    with pytest.raises(Unreachable, match=type(model).__name__), attach(model):
        pass
    assert state(model) == before


def test_no_vision_tower():
    with (
        pytest.raises(Unreachable, match="LlamaForCausalLM has no vision"),
        attach(build("llama")[0], where="vision"),
    ):
        pass


def test_a_policy_needs_a_cache():
    model, inputs = build("llama")
    with pytest.raises(Unsupported, match="use_cache=True"), attach(model, STREAM):
        run(model, inputs, use_cache=False)


@pytest.mark.parametrize("settings", [dict(prompt_lookup_num_tokens=3), dict(assistant=True)])
def test_assisted_decoding_with_a_policy(settings):
    model, _ = build("llama")
    inputs = dict(input_ids=torch.tensor([[7, 8, 9, 10] * 5]))
    if "assistant" in settings:
        settings = dict(assistant_model=build("llama", seed=2)[0])
    expected = greedy(model, inputs, **settings)
    with attach(model):
        assert torch.equal(greedy(model, inputs, **settings), expected)
    for method in (STREAM, catalog.method("h2o", budget=8)):
        with pytest.raises(Unsupported, match="assisted decoding"), attach(model, method):
            greedy(model, inputs, max_new_tokens=20, **settings)


@pytest.mark.parametrize("method", [STREAM, Observer("top1"), Edit(Site(), "scale", 2.0)])
def test_generate_batch_is_refused(method):
    model, _ = build("llama")
    with pytest.raises(Unsupported, match="generate_batch"), attach(model, method):
        model.generate_batch([[1, 2, 3]])
    assert "generate_batch" not in vars(model)


def test_static_cache_with_a_policy():
    model, inputs = build("llama")
    with pytest.raises(Unsupported, match="StaticLayer"), attach(model, STREAM):
        run(model, inputs, past_key_values=StaticCache(model.config, max_cache_len=32))


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", STREAM), ("llama", Edit(Site(), "scale", 2.0)), ("gptoss", None), ("gemma2", None)],
)
def test_dropout_that_would_be_left_out(name, method):
    config = build(name)[0].config
    config.attention_dropout = 0.5
    model = type(build(name)[0])(config).train()
    with pytest.raises(Unsupported, match=r"model\.eval\(\)"), attach(model, method):
        run(model, dict(input_ids=ids()))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit(Site(layers=9), "scale", 2.0), "layers=\\(9,\\)"),
        (Edit(Site(layers=(1, 9)), "scale", 2.0), "layers \\[9\\]"),
        (Edit(Site(heads=(0, 4)), "scale", 2.0), "heads \\[4\\]"),
        (Edit(Site(rows=40), "scale", 2.0), "rows"),
        (Edit(Site(keys=99), "scale", 2.0), "keys"),
        (Edit(Site(phase="decode"), "block"), "decode"),
        (Edit(Site(tower="vision"), "block"), "vision"),
    ],
)
def test_an_edit_that_never_fires(edit, said):
    model, inputs = build("llama")
    before = state(model)
    with pytest.raises(NeverFired, match=said), attach(model, edit):
        run(model, inputs)
    assert state(model) == before


def test_a_policy_that_never_acts():
    model, inputs = build("bert")
    with pytest.raises(NeverFired, match="never saw a cache"), attach(model, STREAM):
        run(model, inputs)


def test_a_name_brings_its_settings():
    """As the command line takes it, alone, beside keywords, and of methods that are laid over one another."""
    model, _ = build("llama")

    def attached(methods, **config):
        (actor,) = attach(model, methods, **config).actors
        return actor.method

    wanted = catalog.method("streaming_llm", sinks=1, window=3)
    assert catalog.method("streaming_llm:sinks=1,window=3") == wanted
    assert attached("streaming_llm:sinks=1,window=3") == wanted
    assert attached(["streaming_llm:sinks=1"], window=3) == wanted
    wanted = catalog.method("snapkv+adakv", window=8, floor=0.1, budget=0.25)
    assert attached(["snapkv:window=8", "adakv:floor=0.1"], budget=0.25) == wanted
    for ask in (catalog.method, attached):
        with pytest.raises(
            ValueError, match=r"every setting is given once \(twice=\['sinks'\], method='streaming"
        ):
            ask("streaming_llm:sinks=1", sinks=2)


def test_wrong_names_and_kinds():
    model, inputs = build("llama")
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        attach(model, "streaming_lm")
    with pytest.raises(ValueError, match="has no setting 'windw'; near names: window"):
        attach(model, "streaming_llm", windw=3)
    with pytest.raises(ValueError, match="without a method's name"):
        attach(model, None, window=3)
    with pytest.raises(Unsupported, match="one cache method at a time, not streaming_llm, h2o"):
        attach(model, ["streaming_llm", "h2o"])
    with pytest.raises(Unsupported, match="is a tracing"):
        attach(model, "retrieval_heads")
    with pytest.raises(TypeError, match="names, methods, edits and observers"):
        attach(model, [3])
    with pytest.raises(TypeError, match=r"PreTrainedModel, not 'Linear'$"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"not 'PeftModel'; attach to its get_base_model\(\)$"):
        attach(type("PeftModel", (torch.nn.Module,), {"get_base_model": lambda self: model})())
    with pytest.raises(TypeError, match=r"not 'DataParallel'; attach to its module$"):
        attach(torch.nn.DataParallel(model))
    with (
        pytest.raises(KeyError, match="no role is called 'image'"),
        attach(model, Edit(Site(keys="image"), "block")),
    ):
        run(model, inputs)


def test_a_mask_of_the_users_own_beside_a_policy():
    model, inputs = build("llama")
    mask = torch.ones(12, 12).tril().bool()[None, None]
    with pytest.raises(Unsupported, match="4-D mask"), attach(model, STREAM):
        run(model, dict(**inputs, attention_mask=mask))


def test_bytes_and_slots():
    model, _ = build("llama")
    cache = DynamicCache()
    with attach(model, STREAM) as attached:
        run(model, dict(input_ids=ids(2, 100)), past_key_values=cache)
        assert attached.stored() == [[8, 8]] * 3
        # keys and values, layers, rows, heads, slots, width
        assert attached.bytes_held() < 2 * 3 * 2 * 2 * 8 * 16 * 4
        run(model, dict(input_ids=ids(2, 1)), past_key_values=cache)
        assert attached.bytes_read() == 3 * 2 * 2 * 9 * 16 * 4


def test_an_attachment_without_a_block_is_closed_once():
    model, inputs = build("llama")
    before = model(**inputs).logits
    attached = attach(model, "streaming_llm", sinks=1, window=3).open()
    assert "not attached" not in repr(attached)
    model(**inputs)
    assert "1 forward>" in repr(attached)
    attached.close()
    attached.close()
    assert "not attached" in repr(attached) and torch.equal(model(**inputs).logits, before)
    never = attach(model, Edit(Site(phase="decode"), "block")).open()
    model(**inputs)
    with pytest.raises(NeverFired):
        never.close()
    assert torch.equal(model(**inputs).logits, before)
