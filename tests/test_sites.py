"""Sites beyond scores, weights and z: by hand through plain hooks on the model's own modules, text by text."""

import copy
from contextlib import contextmanager

import pytest
import torch
import transformers as tf

from regard.attaching.anatomy import anatomy
from regard.attaching.attachment import attach
from regard.attaching.verbs import donors
from regard.core import Edit, NeverFired, Observer, Site, Unreachable, Unsupported
from regard.testing.cache.checks import generate
from regard.testing.tiny import TEXT
from regard.testing.zoo import build, logits

# family -> (layer 1, what its attention adds, what its other sublayer adds), by the model's own names
NAMES = {
    "llama": ("model.layers.1", "self_attn", "mlp"),
    "qwen3": ("model.layers.1", "self_attn", "mlp"),
    "gemma2": ("model.layers.1", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h.1", "attn", "mlp"),
    "neox": ("gpt_neox.layers.1", "attention", "mlp"),
    "gemma3mm": ("model.language_model.layers.1", "post_attention_layernorm", "post_feedforward_layernorm"),
}
MORE = {
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**TEXT)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**TEXT)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**TEXT, residual_multiplier=0.22)),
}
STREAM_SITES = ("resid_pre", "out", "mlp", "resid_post")


def tiny(name):
    if name in MORE:
        torch.manual_seed(0)
        return MORE[name]().eval()
    return build(name)[0]


def padded(batch=3, n=12, pads=(0, 3, 5)):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 118, (batch, n), generator=g)
    mask = torch.arange(n) >= torch.tensor(pads[:batch])[:, None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@contextmanager
def by_hand(model, family, quantity, change):
    """`change` of the tensor [B, N, width] of layer 1, by a hook on the module of that name."""
    layer, out, mlp = NAMES[family]
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    back = lambda y, x: (x, *y[1:]) if isinstance(y, tuple) else x  # noqa: E731
    if quantity == "resid_pre":
        module = model.get_submodule(layer)
        hook = module.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))
    else:
        name = {"out": f"{layer}.{out}", "mlp": f"{layer}.{mlp}", "resid_post": layer}[quantity]
        hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: back(y, change(first(y))))
    try:
        yield
    finally:
        hook.remove()


BASIS = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0]
VALUE = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(2))  # two texts, two rows
VERBS = {
    "replace": (dict(verb="replace", value=VALUE), lambda x, i, j, batch: VALUE[i, j]),
    "zero": (dict(verb="zero"), lambda x, i, j, batch: torch.zeros_like(x)),
    "scale": (dict(verb="scale", value=-2.0), lambda x, i, j, batch: -2 * x),
    "add": (dict(verb="add", value=VALUE[:1, :1]), lambda x, i, j, batch: x + VALUE[0, 0]),
    "mean": (dict(verb="mean"), lambda x, i, j, batch: batch[i].mean(0)),
    "resample": (dict(verb="resample", value=(2, 0)), lambda x, i, j, batch: batch[(1, 0)[i]][j]),
    "project": (dict(verb="project", value=BASIS), lambda x, i, j, batch: x - BASIS @ (BASIS.mT @ x)),
    "swap": (
        dict(verb="project", value=BASIS, source=VALUE),
        lambda x, i, j, batch: x + BASIS @ (BASIS.mT @ (VALUE[i, j] - x)),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("quantity", STREAM_SITES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox"])
def test_verbs_on_streams_are_their_definition(family, quantity, verb):
    """Rows 1 and -1 of texts 0 and 2 of a padded batch: padding has no number."""
    model, inputs = build(family)[0], padded()
    settings, rule = VERBS[verb]
    columns = {0: (1, 11), 2: (6, 11)}

    def change(x):
        new, old = x.clone(), [x[t, list(c)] for t, c in columns.items()]
        for i, (text, at) in enumerate(columns.items()):
            for j, c in enumerate(at):
                new[text, c] = rule(x[text, c], i, j, old)
        return new

    site = Site(quantity, layers=1, rows=(1, -1), texts=(0, 2))
    with torch.no_grad():
        plain = model(**inputs).logits
        with by_hand(model, family, quantity, change):
            wanted = model(**inputs).logits
        with attach(model, Edit(site, **settings)) as attached:
            found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert float((found - wanted)[real].abs().max()) <= 2e-5
    assert float((plain - wanted)[real].abs().max()) > 1e-3
    assert torch.equal(found[1][real[1]], plain[1][real[1]])
    assert list(attached.receipts().values()) == [1]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("quantity", ["q", "k", "v", "z"])
def test_verbs_on_heads_are_their_definition(quantity, verb):
    """Against a hook on the projections of a model whose q, k and v go to attention as they are projected."""
    model, inputs = build("gpt2")[0], padded()
    settings, rule = VERBS[verb]
    cut = lambda v: v[..., :8] if isinstance(v, torch.Tensor) else v  # noqa: E731
    basis = torch.linalg.qr(BASIS[:8])[0]
    named = {k: basis if k == "value" and v is BASIS else cut(v) for k, v in settings.items()}
    named = {k: v[:, None] if isinstance(v, torch.Tensor) and v.dim() == 3 else v for k, v in named.items()}
    columns = {0: (1, 11), 2: (6, 11)}
    start = {"q": 0, "k": 32, "v": 64, "z": 0}[quantity] + 16  # head 2 of width 8

    def rule8(x, i, j, batch):
        if verb in ("replace", "add"):
            return VALUE[i, j, :8] if verb == "replace" else x + VALUE[0, 0, :8]
        if verb == "project":
            return x - basis @ (basis.mT @ x)
        return x + basis @ (basis.mT @ (VALUE[i, j, :8] - x)) if verb == "swap" else rule(x, i, j, batch)

    def change(x):
        new, span = x.clone(), slice(start, start + 8)
        old = [x[t, list(c), span] for t, c in columns.items()]
        for i, (text, at) in enumerate(columns.items()):
            for j, c in enumerate(at):
                new[text, c, span] = rule8(x[text, c, span], i, j, old)
        return new

    attention = model.transformer.h[1].attn
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
    if quantity == "z":
        hook = attention.c_proj.register_forward_pre_hook(lambda m, a: (change(a[0]),))
    else:
        hook = attention.c_attn.register_forward_hook(lambda m, a, y: change(y))
    with torch.no_grad():
        wanted = (model(**inputs, use_cache=False).logits, hook.remove())[0]
        site = Site(quantity, layers=1, heads=2, rows=(1, -1), texts=(0, 2))
        with attach(model, Edit(site, **named)):
            found = [model(**inputs, use_cache=cache).logits for cache in (False, True)]
    real = inputs["attention_mask"].bool()
    for x in found:
        assert float((x - wanted)[real].abs().max()) <= 2e-5
    assert float((plain - wanted)[real].abs().max()) > 1e-3
    assert torch.equal(found[0][1][real[1]], plain[1][real[1]])


@pytest.mark.parametrize("quantity", ["resid_mid", *STREAM_SITES, "q", "k", "v", "z", "logits"])
@pytest.mark.parametrize("family", [*NAMES, *MORE])
def test_what_is_observed_can_be_put_back(family, quantity):
    """A run's own values change nothing; those of another text make it that text where they are the whole state."""
    model = tiny(family)
    g = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randint(3, 118, (2, 9), generator=g) for _ in "12")
    if quantity == "resid_mid" and family in ("neox", "cohere"):
        with (
            pytest.raises(Unreachable, match="run side by side"),
            attach(model, Observer("value", Site(quantity))),
        ):
            pass
        return
    run = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    site = Site(quantity, tower="text") if quantity == "logits" else Site(quantity, layers=1, tower="text")
    observer = Observer("value", site)
    with torch.no_grad():
        with attach(model):
            plain, other = run(ours), run(theirs)
        with attach(model, observer) as seen:
            assert torch.equal(run(ours), plain)
            assert torch.equal(run(theirs), other)
        own, foreign = (x for _, _, x in seen.records["value"])
        with attach(model, Edit(site, "replace", own)):
            assert float((run(ours) - plain).abs().max()) <= {"resid_mid": 1e-5, "k": 1e-6, "v": 1e-6}.get(
                quantity, 0
            )
        with attach(model, Edit(site, "replace", foreign)):
            moved = run(ours)
    assert not torch.equal(own, foreign)
    if quantity in ("resid_pre", "resid_mid", "resid_post", "logits"):
        torch.testing.assert_close(moved, other, rtol=0, atol=2e-5)
    else:
        assert float((moved - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("family", [*NAMES, *MORE])
def test_the_residual_is_the_sum_of_what_is_added(family):
    model = tiny(family)
    quantities = ("resid_pre", "out", "mlp", "resid_post")
    with attach(model, [Observer("value", Site(q), name=q) for q in quantities]) as attached, torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None])
    pre, out, mlp, post = (torch.stack([x for _, _, x in attached.records[q]]) for q in quantities)
    torch.testing.assert_close(pre + out + mlp, post)
    torch.testing.assert_close(pre[1:], post[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("quantity", ["k", "v"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_key_that_was_edited_stays_edited(family, quantity):
    """Fed at once without a cache, or as a prompt and single tokens: the cache holds what the edit made."""
    model, _ = build(family)
    ids = torch.arange(3, 15)[None]
    edits = [Edit(Site(quantity, layers=1, heads=0, rows=2, phase="prefill"), "scale", -1.5)]
    with attach(model, edits), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :8], use_cache=True)
        steps = []
        for i in range(8, 12):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 8:], rtol=0, atol=2e-5)
    with torch.no_grad():
        assert float((model(input_ids=ids).logits - whole)[:, 8:].abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "neox", "qwen3"])
def test_rotate_moves_a_query_as_positions_do(family):
    """The only query that reads is turned by two: as if all keys stood two places earlier."""
    model, _ = build(family)
    ids = torch.arange(3, 15)[None]
    get = Observer("value", Site("scores", layers=0, rows=-1), name="scores")
    with torch.no_grad():
        with attach(model, [Edit(Site("q", layers=0, rows=-1), "rotate", 2), get]) as turned:
            model(input_ids=ids, use_cache=False)
        places = torch.arange(12)[None].clone()
        places[:, -1] += 2
        with attach(model, get) as moved:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False)
        with attach(model, get) as plain:
            model(input_ids=ids, use_cache=False)
    a, b, c = (x.records["scores"][0][2] for x in (turned, moved, plain))
    # the last key moves with its query where positions say so
    torch.testing.assert_close(a[..., :-1], b[..., :-1], rtol=1e-4, atol=1e-4)
    assert float((a - c)[..., :-1].abs().max()) > 1e-2


def test_uniform_keeps_the_mass_of_its_keys():
    model, inputs = build("llama")
    get = Observer("value", Site("weights", layers=1, heads=(0, 2), rows=(5, -1)), name="w")
    edit = Edit(Site("weights", layers=1, heads=2, rows=-1, keys=(1, 4, 7)), "uniform")
    with torch.no_grad():
        with attach(model, get) as before:
            model(**inputs)
        with attach(model, [edit, get]) as after:
            model(**inputs)
    a, b = before.records["w"][0][2], after.records["w"][0][2]
    wanted = a.clone()
    wanted[:, 1, 1, [1, 4, 7]] = a[:, 1, 1, [1, 4, 7]].mean(-1, keepdim=True)
    torch.testing.assert_close(b, wanted)
    torch.testing.assert_close(b.sum(-1), torch.ones_like(b.sum(-1)))


@pytest.mark.parametrize("quantity", ["mlp", "z"])
def test_a_mean_is_over_the_rows_of_each_text(quantity):
    """Without padding too, and of named rows alone."""
    model, ids = build("llama")[0], torch.arange(3, 27).view(2, 12)
    get = Observer("value", Site(quantity, layers=1), name="x")
    edit = Edit(Site(quantity, layers=1, rows=(2, 5, 9)), "mean")
    with torch.no_grad():
        with attach(model, get) as before:
            model(input_ids=ids)
        with attach(model, [edit, get]) as after:
            model(input_ids=ids)
    a, b = (x.records["x"][0][2] for x in (before, after))
    wanted = a.clone()
    wanted[..., [2, 5, 9], :] = a[..., [2, 5, 9], :].mean(-2, keepdim=True)
    torch.testing.assert_close(b, wanted)


def test_texts_of_a_batch_are_independent():
    """One edit for each text is what each text gets alone, on every quantity."""
    model, inputs = build("llama")[0], padded()
    for quantity in ("q", "v", "scores", "weights", "z", "out", "resid_post", "logits"):
        by_layer = {} if quantity == "logits" else {"layers": 1}
        edits = [Edit(Site(quantity, **by_layer, texts=t), "scale", 0.5 + t) for t in range(3)]
        with torch.no_grad(), attach(model, edits):
            together = model(**inputs).logits
        for t, edit in enumerate(edits):
            alone = {name: x[t : t + 1] for name, x in inputs.items()}
            site = Site(quantity, **by_layer)
            with torch.no_grad(), attach(model, Edit(site, "scale", edit.value)):
                wanted = model(**alone).logits
            real = alone["attention_mask"].bool()
            assert float((together[t : t + 1] - wanted)[real].abs().max()) <= 2e-5, quantity


def test_phases_and_receipts_of_streams():
    model, inputs = build("llama")
    edits = [
        Edit(Site("resid_post", layers=(0, 2), phase="prefill"), "scale", 0.5),
        Edit(Site("mlp", phase="decode"), "scale", 0.5),
        Edit(Site("logits", rows=-1), "add", torch.eye(128)[7] * 100),
    ]
    with attach(model, edits) as attached:
        out = generate(model, {**inputs, "attention_mask": torch.ones(1, 12)}, max_new_tokens=4)
    assert list(attached.receipts().values()) == [2, 3 * 3, 4]
    assert out.sequences[0, 12:].tolist() == [7] * 4


def identities(model):
    """Everything that an attachment might touch, by identity."""
    parts = [model.config, model.config._attn_implementation_internal, type(model).forward]
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        parts += [module, vars(module).get("forward"), module.training, *(tuple(h.items()) for h in hooks)]
    return parts, [id(p) for p in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_nothing_is_left_behind(family):
    model, inputs = build(family)
    other = copy.deepcopy(model)
    before = identities(model), identities(other), dict(tf.AttentionInterface._global_mapping)
    edits = [
        Edit(Site(q, layers=1), "scale", 0.5)
        for q in ("q", "v", "z", "resid_pre", "out", "mlp", "resid_post")
    ]
    with torch.no_grad(), attach(model, [*edits, Edit(Site("logits"), "scale", 0.5)]):
        model(**inputs)
        untouched = logits(other(**inputs))
    with pytest.raises(RuntimeError, match="stop"), attach(model, edits):
        raise RuntimeError("stop")
    assert (identities(model), identities(other), dict(tf.AttentionInterface._global_mapping)) == before
    with torch.no_grad():
        assert torch.equal(logits(model(**inputs)), untouched)


def test_the_models_mode_and_hooks_survive_the_question():
    """A model is asked what its layers add: its modes and random numbers stay, hooks of the user see nothing."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, y: calls.append(1))
    state = torch.get_rng_state()
    assert len(anatomy(model)) == 3
    assert not calls and model.training and not model.model.layers[0].training
    assert torch.equal(state, torch.get_rng_state())


def test_a_module_that_was_exchanged_is_asked_again():
    """An adapter put in the place of a sublayer after the first question: edits act on what runs."""
    model, inputs = build("llama")
    assert len(anatomy(model)) == 3
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, Edit(Site("mlp", layers=1), "scale", 0.5)) as attached:
            assert not torch.equal(model(**inputs).logits, plain)
    assert list(attached.receipts().values()) == [1]


def test_what_is_refused_is_refused_by_name():
    model, inputs = build("llama")
    for bad, error, match in [
        (lambda: Site("resid_post", heads=1), ValueError, "of a whole layer"),
        (lambda: Site("mlp", keys=1), ValueError, "has no keys"),
        (lambda: Edit(Site("mlp"), "move", 1.0, to=1), ValueError, "move acts on weights"),
        (lambda: Edit(Site("v"), "rotate", 1), ValueError, "rotate acts on q, k"),
        (lambda: Edit(Site("mlp"), "add"), ValueError, "add takes a value"),
        (lambda: Edit(Site("mlp"), "zero", 3), ValueError, "zero takes no value"),
        (lambda: Site("head"), ValueError, "quantity is one of"),
    ]:
        with pytest.raises(error, match=match):
            bad()
    for edit, error, match in [
        (Edit(Site("resid_post", layers=7), "zero"), Unreachable, "layer 7: LlamaForCausalLM has 3 layers"),
        (Edit(Site("mlp", tower="vision"), "zero"), Unsupported, "in the text tower"),
        (Edit(Site("mlp", texts=4), "zero"), ValueError, "texts are of the batch"),
        (Edit(Site("mlp", phase="decode"), "zero"), NeverFired, "never fired"),
        (Edit(Site("z", heads=(0, 9)), "zero"), NeverFired, r"heads \[9\]"),
        (Edit(Site("mlp"), "resample"), ValueError, "two or more"),
        (Edit(Site("mlp"), "replace", torch.zeros(5, 7)), ValueError, "broadcasts to"),
        (Edit(Site("mlp"), "project", torch.ones(32, 2)), ValueError, "orthonormal"),
    ]:
        with pytest.raises(error, match=match), torch.no_grad(), attach(model, edit):
            model(**inputs)
    for family in ("t5", "bert", "gemma3n"):
        with (
            pytest.raises(Unreachable, match="residual of"),
            attach(build(family)[0], Edit(Site("mlp"), "zero")),
        ):
            pass


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16(family):
    model, inputs = build(family)
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, Observer("value", Site("resid_post", layers=1))) as seen:
            model(**inputs)
        with attach(model, Edit(Site("resid_post", layers=1), "replace", seen.records["value"][0][2])):
            assert torch.equal(model(**inputs).logits, plain)
        with attach(model, Edit(Site("mlp", layers=1), "scale", 0.0)):
            assert not torch.equal(model(**inputs).logits, plain)


def test_an_edit_that_is_refused_leaves_nothing_behind():
    """Layer 0 is hooked when layer 1 is refused: its hooks go, and compiled models run compiled again."""
    model = tiny("neox")
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    edits = [Edit(Site("mlp", layers=0), "scale", 0.5), Edit(Site("resid_mid", layers=1), "scale", 0.5)]
    with pytest.raises(Unreachable, match="side by side"), attach(model, edits):
        pass
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    graphs = []
    traced = torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert float(traced(torch.tensor(1.0))) == 2 and len(graphs) == 1


@pytest.mark.parametrize("quantity", [*STREAM_SITES, "resid_mid", "logits", "z"])
def test_float16(quantity):
    model, ids = (
        tiny("llama").half(),
        torch.randint(3, 118, (2, 12), generator=torch.Generator().manual_seed(1)),
    )
    layers = {} if quantity == "logits" else {"layers": 1}
    edit = Edit(Site(quantity, **layers, rows=-1, heads=1 if quantity == "z" else None), "scale", 0.5)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with attach(model, edit):
            edited = model(ids, use_cache=False).logits
    assert edited.dtype == torch.float16 and edited.isfinite().all()
    assert torch.equal(edited[:, :-1], plain[:, :-1]) and not torch.equal(edited[:, -1], plain[:, -1])


@pytest.mark.parametrize("quantity", STREAM_SITES)
@pytest.mark.parametrize("first", ["compiled", "attached"])
def test_a_compiled_model_is_edited_and_is_itself_again(quantity, first):
    model, ids = tiny("llama"), torch.randint(3, 118, (2, 12), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="eager")
    run = lambda m: m(ids, use_cache=False).logits  # noqa: E731
    edit = Edit(Site(quantity, layers=0, rows=-1), "scale", 0.5)
    with torch.no_grad():
        plain = run(compiled if first == "compiled" else model)
        with attach(model, edit):
            assert torch.equal(run(compiled), run(model)) and not torch.equal(run(compiled), plain)
        assert torch.equal(run(compiled), plain)


def test_live_records_carry_gradients():
    """d logit / d z through a record equals that by perturbing z."""
    model, inputs = build("llama")
    site = Site("z", layers=1, heads=(0, 1, 2, 3))
    live = Observer("value", Site("z", layers=1), live=True)
    with attach(model, live) as seen:
        out = model(**inputs, use_cache=False).logits[0, -1, 5]
        z = seen.records["value"][0][2]
        (g,) = torch.autograd.grad(out, z)
    step = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)) * 1e-2
    ends = []
    for sign in (1, -1):
        with torch.no_grad(), attach(model, Edit(site, "add", sign * step)):
            ends.append(model(**inputs, use_cache=False).logits[0, -1, 5])
    assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((g * step).sum()), rel=2e-2)


def test_what_is_found_out_by_a_forward_is_written_down_by_nobody():
    """A model whose layers are not known yet is asked for them before an observer looks."""
    model, inputs = build("llama", seed=77)
    with attach(model, [Observer("last_row", Site()), Observer("value", Site("mlp"))]) as attached:
        model(**inputs)
    assert {step for records in attached.records.values() for _, step, _ in records} == {0}


def test_a_text_gets_what_the_next_one_of_its_batch_has():
    assert donors(Edit(Site("mlp"), "resample"), [0, 1, 2], 3) == [1, 2, 0]
    assert donors(Edit(Site("mlp"), "resample", 2), [0, 1], 3) == [2, 2]
