"""Edits and observers against explicit attention, row by row and key by key, and against the models' own weights."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from regard import catalog
from regard.attaching.attachment import attach
from regard.core import Edit, NeverFired, Observer, Site
from regard.testing.cache.checks import feeds_of, generate, grown_mask
from regard.testing.cache.oracle import explicit_attention, gap, hide
from regard.testing.cache.script import NEAR, play, real, script
from regard.testing.zoo import build, ids, logits

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gptoss", "gpt2", "neox", "deepseek3")
# of the forward that feeds four tokens: padding before, after and around a row's tokens
GAPS = {2: ((2, 0), (0, 1), (1, 1))}
MARK = {"marked": lambda tokens: tokens % 3 == 0}


# -- the definition, by hand


def keys_by_hand(keys, m, role, mask):
    """[B or 1, m] bool: numbers count the tokens of each text, padding left out."""
    if keys is None:
        return torch.ones(1, m, dtype=torch.bool)
    if isinstance(keys, str):
        return role[:, :m]
    hit = torch.zeros(len(mask), m, dtype=torch.bool)
    for text, hits in zip(mask[:, :m].tolist(), hit):
        columns = [j for j in range(m) if text[j]]
        for key in keys:
            if -len(columns) <= key < len(columns):
                hits[columns[key]] = True
    return hit


def rows_by_hand(rows, n, m, text):
    """The columns of a forward that a site's rows are in one text, in order; padding is no row."""
    if rows is None:
        return list(range(n))
    columns = [r for r in range(n) if text[m - n + r]]
    return [c for i, c in enumerate(columns) if i in rows or i - len(columns) in rows]


def by_hand(*edits, feeds, role=None):
    """What `hide` calls: every edit carried out on its own text, head, row and keys, one after the other."""
    mask = feeds[-1]["attention_mask"]

    def change(layer, quantity, x, seen):
        x, (_, heads, n, m) = x.clone(), seen.shape
        phase = "decode" if n == 1 and m > 1 else "prefill"
        for edit in (e for e in edits if e.site.quantity == quantity and e.site.covers(layer, "text", phase)):
            site = edit.site
            source = keys_by_hand(site.keys, m, role, mask).expand(len(mask), -1)
            for b in range(len(mask)):
                rows, one = rows_by_hand(site.rows, n, m, mask[b]), slice(b, b + 1)
                for h in range(heads) if site.heads is None else site.heads:
                    for i, r in enumerate(rows):
                        if quantity == "z":
                            x[one, h, r] = verb_by_hand(edit, x[one, h, r], h, i)
                        elif edit.verb == "move":
                            to = keys_by_hand(edit.to, m, role, mask)[one]
                            x[one, h, r] = move_by_hand(
                                x[one, h, r], source[one], to, edit.value, seen[one, h, r]
                            )
                        else:
                            new = verb_by_hand(edit, x[one, h, r], h, i)
                            x[one, h, r] = torch.where(source[one] & seen[one, h, r], new, x[one, h, r])
        return x

    return change


def verb_by_hand(edit, row, h, number):
    value = edit.value
    if torch.is_tensor(value) and value.dim():
        value = value.expand(row.shape[0], len(edit.site.heads), value.shape[2], row.shape[-1])
        value = value[:, edit.site.heads.index(h), min(number, value.shape[2] - 1)]
    if edit.verb == "block":
        return torch.full_like(row, -torch.inf) if edit.site.quantity == "scores" else torch.zeros_like(row)
    return row * value if edit.verb == "scale" else torch.zeros_like(row) + value


def move_by_hand(row, source, to, share, seen):
    row = row.clone()
    for b in range(len(row)):
        give = source.expand(row.shape)[b].clone()
        take = to.expand(row.shape)[b] & seen[b]
        if not take.any():
            continue
        there = row[b][take].clone()
        taken = share * row[b][give].sum()
        row[b][give] *= 1 - share
        row[b][take] += taken * (there / there.sum() if there.sum() > 0 else 1 / int(take.sum()))
    return row


def site(quantity="weights", **where):
    return Site(quantity, **where)


EDITS = {
    "scale scores": Edit(site("scores", layers=1, heads=(0, 3), keys=(2, 9, -1)), "scale", 0.3),
    "replace scores": Edit(site("scores", heads=1, rows=(-1, 0), keys=(0, 7, -2)), "replace", 2.5),
    "block scores": Edit(site("scores", layers=(0, 2), keys=(8, 10, 12)), "block"),
    "scale weights": Edit(site(layers=2, heads=(1, 2), rows=(-1, -2)), "scale", 1.7),
    "replace weights": Edit(site(layers=1, heads=2, keys=(3, 11)), "replace", 0.4),
    "replace by a tensor": Edit(
        site(layers=1, heads=(3, 1), rows=(-1,)), "replace", torch.tensor([0.1, 0.2]).view(1, 2, 1, 1)
    ),
    "block weights": Edit(site(heads=(0, 1), keys=(1, 10)), "block"),
    "move": Edit(site(layers=(1, 2), heads=(1, 3), keys=(5, 9, 13)), "move", 0.6, to=(2, 10)),
    "move to a role": Edit(site(rows=-1), "move", 0.5, to="marked"),
    "move from a role": Edit(site(layers=0, keys="marked"), "move", 1.0, to=(-1, 9)),
    "scale a role": Edit(site("scores", layers=1, keys="marked"), "scale", 0.1),
    "in steps only": Edit(site(keys=(9, 12, -2), phase="decode"), "block"),
    "in prompts only": Edit(site("scores", keys=(9, 12), phase="prefill"), "block"),
    "scale z": Edit(site("z", layers=1, heads=(0, 2), rows=(0, -1)), "scale", -1.5),
    "block z": Edit(site("z", layers=2, heads=3), "block"),
    "replace z": Edit(site("z", layers=0, heads=(1, 2)), "replace", 0.2),
}


def role_of(feeds):
    return torch.cat([f["input_ids"] for f in feeds], 1) % 3 == 0


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_edit_is_its_definition(family, name):
    model, _ = build(family)
    feeds, edit = script(steps=(20, 1, 4, 1), gaps=GAPS), EDITS[name]
    result = play(model, None, feeds, [edit], roles=MARK)
    wanted = hide(model, feeds, change=by_hand(edit, feeds=feeds, role=role_of(feeds)))
    assert gap(feeds, result.outs, wanted) <= NEAR
    assert gap(feeds, hide(model, feeds), wanted) > 1e-3


@pytest.mark.parametrize("method", ["h2o", "snapkv", "recycled_attention"])
@pytest.mark.parametrize(
    "name", ["scale scores", "block scores", "replace weights", "move", "scale a role", "scale z"]
)
def test_edit_under_a_policy(method, name):
    model, _ = build("llama")
    small = dict(budget=10, **({"window": 3} if method == "snapkv" else {}))
    feeds, edit = script(steps=(20, 1, 1, 4, 1), gaps={3: GAPS[2]}), EDITS[name]
    tape = play(model, catalog.method(method, **small), feeds, [edit], roles=MARK)
    change = by_hand(edit, feeds=feeds, role=role_of(feeds))
    assert gap(feeds, tape.outs, hide(model, feeds, tape.reads, change)) <= NEAR
    assert gap(feeds, tape.outs, hide(model, feeds, change=change)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptoss"])
def test_edits_compose(family):
    """All on the same heads and rows: scores first, then weights, then z, each kind in the order given."""
    model, _ = build(family)
    edits = [
        Edit(site("z", layers=1, heads=(0, 1)), "scale", 0.5),
        Edit(site(layers=1, heads=(0, 1), keys=(9, 10)), "scale", 3.0),
        Edit(site("scores", layers=1, heads=(1, 2), keys=(11,)), "block"),
        Edit(site(layers=1, heads=(1, 3), rows=(-1, -2), keys=(9, 10)), "move", 0.5, to=(12,)),
        Edit(site("scores", layers=1, rows=(-2, 3), keys=(8, 13)), "scale", -1.0),
        Edit(site("z", layers=1, heads=0, rows=-1), "replace", 0.3),
    ]
    feeds = script(steps=(20, 1, 4, 1))
    for chosen in (edits, edits[::-1]):
        assert (
            gap(
                feeds,
                play(model, None, feeds, chosen).outs,
                hide(model, feeds, change=by_hand(*chosen, feeds=feeds)),
            )
            <= NEAR
        )


def test_a_patch_of_many_rows():
    """A tensor for chosen heads and scattered rows; a patch of a run's own weights changes nothing."""
    model, inputs = build("llama")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True)
    for layer, weights in enumerate(expected.attentions):
        patch = Edit(
            Site(layers=layer, heads=(2, 0), rows=(11, 1, 5)), "replace", weights[:, [2, 0]][:, :, [1, 5, 11]]
        )
        with attach(model, patch), torch.no_grad():
            assert float((model(**inputs).logits - expected.logits).abs().max()) <= 1e-5
    values = torch.rand(1, 2, 3, 12)
    patch = Edit(Site(layers=1, heads=(2, 0), rows=(11, 1, 5)), "replace", values)
    feeds = script(steps=(12,), pads=(0,))
    assert (
        gap(
            feeds,
            play(model, None, feeds, [patch]).outs,
            hide(model, feeds, change=by_hand(patch, feeds=feeds)),
        )
        <= NEAR
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_z_is_the_input_of_the_projection(family):
    """Against a hook on the output projection, which shares nothing with the attention function."""
    model, inputs = build(family)
    block = {"llama": "model.layers.1.self_attn.o_proj", "gpt2": "transformer.h.1.attn.c_proj"}
    project = model.get_submodule(block.get(family, "gpt_neox.layers.1.attention.dense"))
    seen = []

    def cut(module, args):
        seen.append(args[0].unflatten(-1, (4, 8)).transpose(1, 2).clone())
        x = args[0].clone()
        x[:, [2, 5], 8:16] *= 0.25  # rows 2 and 5 of head 1
        return (x,)

    hook = project.register_forward_pre_hook(cut)
    with torch.no_grad():
        wanted = model(**inputs).logits
    hook.remove()
    with attach(model, Edit(Site("z", layers=1, heads=1, rows=(2, 5)), "scale", 0.25)), torch.no_grad():
        assert float((model(**inputs).logits - wanted).abs().max()) <= 1e-6
    with (
        attach(model, Observer("z", Site(layers=1, heads=(0, 3), rows=(1, -1)))) as attached,
        torch.no_grad(),
    ):
        model(**inputs)
    ((layer, step, z),) = attached.records["z"]
    assert (layer, step) == (1, 0)
    torch.testing.assert_close(z, seen[0][:, [0, 3]][:, :, [1, 11]])


# -- what is not touched stays


@pytest.mark.parametrize("quantity", ["scores", "weights", "z"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "neox"])
def test_other_rows_and_heads_are_bitwise_the_models_own(family, quantity):
    model, inputs = build(family)
    z = Observer("z", Site("z", layers=2))
    with torch.no_grad():
        expected = logits(model(**inputs))
        with attach(model, z) as before:
            assert torch.equal(logits(model(**inputs)), expected)
        with attach(model, [Edit(Site(quantity, layers=2, heads=1, rows=(3, 4)), "scale", 0.5), z]) as after:
            result = logits(model(**inputs))
    others = [r for r in range(12) if r not in (3, 4)]
    assert torch.equal(result[:, others], expected[:, others])
    assert not torch.equal(result[:, 3], expected[:, 3])
    a, b = before.records["z"][0][2], after.records["z"][0][2]
    changed = (a != b).any(-1)
    assert changed[:, 1, 3:5].all()
    assert int(changed.sum()) == 2


def test_gradients_go_through_edits():
    model, inputs = build("llama")
    edit = Edit(Site("scores", layers=1, heads=(0, 2), keys=(1, 4)), "scale", 0.3)
    inputs, grads = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, []
    for on in (True, False):
        model.zero_grad()
        change = by_hand(edit, feeds=[inputs])
        if on:
            with attach(model, edit):
                model(**inputs).logits.square().mean().backward()
        else:
            with explicit_attention(model, {}, change):
                model(**inputs).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# -- roles, phases, receipts


@pytest.mark.parametrize("settings", [{}, dict(num_beams=3, output_scores=True)])
def test_roles_grow_while_a_model_generates(settings):
    model, _ = build("llama")
    feed, edit = script(steps=(20,), pads=(0, 6))[0], Edit(Site("scores", keys="marked"), "scale", 0.2)
    with attach(model, edit, roles=MARK) as attached:
        out = generate(model, feed, max_new_tokens=8, **settings)
    assert attached.receipts() == {str(edit): 8 * 3}
    feeds = feeds_of(out.sequences[:, :-1], grown_mask(feed, 27), (20, *[1] * 7))
    outs = hide(model, feeds, change=by_hand(edit, feeds=feeds, role=out.sequences % 3 == 0))
    by_step = torch.stack([x[:, -1] for x in outs], 1)
    if settings:
        chosen = by_step.log_softmax(-1).gather(-1, out.sequences[:, 20:, None])[..., 0].mean(-1)
        assert float((chosen - out.sequences_scores).abs().max()) <= NEAR
    else:
        assert float((by_step - torch.stack(out.logits, 1)).abs().max()) <= NEAR


def test_image_tokens_of_a_vision_language_model():
    model, inputs = build("llava")
    edit = Edit(Site(tower="text", rows=-1, keys=None), "move", 0.7, to="image")
    image = inputs["input_ids"] == 120
    observer = Observer("last_row", Site(tower="text"))
    masses = []
    for methods in ([observer], [edit, observer]):
        with attach(model, methods, roles={"image": lambda t: (t == 120).long() * 2 - 1}) as attached:
            generate(model, {**inputs}, max_new_tokens=3, pixel_values=inputs["pixel_values"])
        assert len(attached.records["last_row"]) == 3 * 3
        masses.append(
            torch.stack([w[..., :25][..., image[0]].sum(-1) for _, _, w in attached.records["last_row"][:3]])
        )
    torch.testing.assert_close(masses[1][0], masses[0][0] + 0.7 * (1 - masses[0][0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "gemma3mm", "qwen25vl", "smolvlm"])
def test_a_role_is_of_tokens_so_that_patches_of_a_tower_are_left_as_they_are(family):
    model, inputs = build(family)
    anywhere, text = (Edit(Site("scores", keys="image", tower=tower), "block") for tower in (None, "text"))
    moved, there = (Edit(Site(tower=tower), "move", 0.5, to="image") for tower in (None, "text"))
    found = []
    for edit in (anywhere, text, moved, there):
        with torch.no_grad(), attach(model, edit) as attached:
            found.append(model(**inputs).logits)
        assert min(attached.receipts().values()) > 0
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    with torch.no_grad():
        assert all(float((x - model(**inputs).logits).abs().max()) > 1e-4 for x in found)


def test_a_role_in_a_vision_tower_is_refused():
    for wrong in (
        lambda: Site("scores", keys="image", tower="vision"),
        lambda: Edit(Site(tower="vision"), "move", 0.5, to="image"),
    ):
        with pytest.raises(ValueError, match="patches in a vision tower have no roles"):
            wrong()


def test_receipts_and_phases():
    model, inputs = build("llama")
    edits = [
        Edit(Site(layers=(0, 2), keys=0, phase="prefill"), "scale", 0.5),
        Edit(Site(keys=13, phase="decode"), "scale", 0.5),
        Edit(Site("z", heads=1), "scale", 0.5),
    ]
    with attach(model, edits) as attached:
        generate(model, {**inputs, "attention_mask": torch.ones(1, 12)}, max_new_tokens=4)
    assert list(attached.receipts().values()) == [2, 2 * 3, 4 * 3]


def test_an_edit_of_keys_that_nobody_sees_never_fires():
    """Key 2 lies outside every window of six by the time that tokens are generated."""
    model, _ = build("mistral")
    with pytest.raises(NeverFired):
        play(model, None, script(steps=(20, 1, 1), pads=(0,)), [Edit(Site(keys=2, phase="decode"), "block")])


def test_an_edit_that_leaves_its_keys_behind_never_fires():
    model, _ = build("llama")
    feeds = script(steps=(20, 1, 1), pads=(0,))
    with pytest.raises(NeverFired):
        play(
            model,
            catalog.method("streaming_llm", budget=8),
            feeds,
            [Edit(Site(keys=9, phase="decode"), "block")],
        )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Site("weight"), "quantity is one of"),
        (lambda: Edit(Site(), "scael", 2), "verb is one of"),
        (lambda: Edit(Site("z", keys=1), "block"), "no keys"),
        (lambda: Edit(Site("scores"), "move", 0.5, to=1), "move acts on weights"),
        (lambda: Edit(Site(), "move", 1.5, to=1), "in \\[0, 1\\]"),
        (lambda: Edit(Site(), "scale"), "takes a value"),
        (lambda: Observer("mass_at"), "takes keys_of"),
        (lambda: Observer("spans"), "takes spans"),
        (lambda: Observer("top1", spans=((0, 2),)), "takes spans"),
        (lambda: Observer("spans", spans=((2, 2),)), "first < past"),
    ],
)
def test_wrong_edits(made, said):
    with pytest.raises(ValueError, match=said):
        made()


# -- observers


def eager_attentions(model, feeds):
    """The weights that transformers' own eager attention returns, by forward and layer, on its own full cache."""
    other, cache = copy.deepcopy(model), DynamicCache()
    other.set_attn_implementation("eager")
    with torch.no_grad():
        return [other(**f, past_key_values=cache, output_attentions=True).attentions for f in feeds]


@pytest.mark.parametrize("family", FAMILIES)
def test_observers_are_the_eager_weights(family):
    model, _ = build(family)
    feeds = script(steps=(20, 1, 4), gaps=GAPS)
    expected = eager_attentions(model, feeds)
    observers = [
        Observer("last_row", Site(heads=(1, 3))),
        Observer("top1"),
        Observer("received", Site(rows=(-1, -3, 18))),
        Observer("mass_at", Site(heads=(2, 0)), keys_of=lambda rows: rows - 1),
        Observer("spans", Site(heads=(3, 1)), spans=SPANS),
    ]
    with attach(model, observers) as attached, torch.no_grad():
        cache = DynamicCache()
        for feed in feeds:
            model(**feed, past_key_values=cache)
    for i, (step, layer) in enumerate((s, x) for s in range(3) for x in range(3)):
        w = expected[step][layer]  # [B, H, N, M]
        for name, records in attached.records.items():
            assert records[i][:2] == (layer, step)
            for b, text in enumerate(feeds[step]["attention_mask"].tolist()):
                wanted, got = observed_by_hand(name, w[b], text), records[i][2][b]
                got = got if wanted.shape == got.shape else got[:, real(feeds, step)[b]]
                assert float((got - wanted).abs().max()) <= 1e-5, (name, step, layer, b)


SPANS = ((0, 3), (5, 6), (2, 18), (17, 40))  # they overlap, and the last is longer than the text


def observed_by_hand(name, w, text):
    """What an observer of one text gives: w [H, N, M] weights, text: which of the M columns are tokens."""
    n, m = w.shape[1:]
    columns = [j for j in range(m) if text[j]]
    rows = [j - (m - n) for j in columns if j >= m - n]  # the forward's tokens
    if name == "last_row":
        return w[[1, 3], rows[-1]]
    if name == "received":
        return w[:, [r for i, r in enumerate(rows) if i in (len(rows) - 1, len(rows) - 3, 18)]].sum(1)
    if name == "top1":
        return torch.tensor([[columns.index(int(w[h, r].argmax())) for r in rows] for h in range(len(w))])
    if name == "spans":
        sums = [w[[3, 1]][:, rows][..., columns[first:past]].sum(-1) for first, past in SPANS]
        return torch.stack(sums, -1)
    places = [columns.index(m - n + r) for r in rows]
    mass = [w[[2, 0], r, columns[p - 1]] if p else torch.zeros(2) for r, p in zip(rows, places)]
    return torch.stack(mass, -1)


@pytest.mark.parametrize("family", ["whisper", "t5"])
@pytest.mark.parametrize("tower", ["encoder", "decoder", "cross"])
def test_observers_of_an_encoder_and_a_decoder(family, tower):
    model, inputs = build(family)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        out = other(**inputs, output_attentions=True)
        with attach(model, Observer("received", Site(tower=tower))) as attached:
            model(**inputs)
    expected = {
        "encoder": out.encoder_attentions,
        "decoder": out.decoder_attentions,
        "cross": out.cross_attentions,
    }[tower]
    assert [layer for layer, _, _ in attached.records["received"]] == [0, 1]
    for (_, _, result), w in zip(attached.records["received"], expected):
        torch.testing.assert_close(result, w.sum(2), rtol=1e-4, atol=1e-5)


def test_observers_under_a_policy_number_the_tokens_of_the_text():
    model, _ = build("llama")
    feeds = script(steps=(20, 1, 1), pads=(0, 6))
    observers = [Observer("top1", Site(phase="decode")), Observer("last_row", Site(phase="decode"))]
    policy = catalog.method("streaming_llm", budget=8, positions="text")
    with attach(model, [policy, *observers]) as attached, torch.no_grad():
        cache = DynamicCache()
        for feed in feeds:
            model(**feed, past_key_values=cache)
    # three layers, two steps of decoding
    assert [len(records) for records in attached.records.values()] == [6, 6]
    for _, step, top in attached.records["top1"]:
        for row, pad in enumerate((0, 6)):
            held = {*range(4), *range(20 + step - 5 - pad, 20 + step - pad)}
            assert set(top[row].flatten().tolist()) <= held
    assert all(w.shape[-1] == 9 for _, _, w in attached.records["last_row"])


def test_what_observers_and_attentions_show_is_what_the_model_used():
    model, inputs = build("llama")
    edit = Edit(Site(layers=1, heads=(0, 3), keys=(2, 5)), "block")
    with attach(model, [edit, Observer("received", Site(layers=1))]) as attached, torch.no_grad():
        out = model(**inputs, output_attentions=True)
    received = attached.records["received"][0][2]
    assert not received[:, [0, 3]][..., [2, 5]].any()
    assert received[:, [1, 2]][..., [2, 5]].all()
    torch.testing.assert_close(out.attentions[1].sum(2), received)


# -- memory


class Largest(TorchDispatchMode):
    """The largest storage that any operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    "methods",
    [
        [Observer("received"), Observer("top1"), Observer("last_row")],
        [Observer("spans", spans=((0, 3000), (3000, 4096)))],
        [Edit(Site("scores", rows=(-1, 7), keys=(1, 2)), "block")],
        [Edit(Site(heads=1, keys=(1, 2)), "scale", 0.5)],
        [catalog.method("h2o", budget=256)],
    ],
    ids=["observers", "spans", "two rows", "a head", "h2o"],
)
def test_nothing_holds_n_by_n(methods):
    n = 4096
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=n,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = ids(1, n) % 32
    with attach(model, methods), torch.no_grad(), Largest() as largest:
        model(input_ids=tokens, use_cache=True)
    assert 0 < largest.bytes <= n * n * 4 / 2  # half of what one head's scores would be


@pytest.mark.parametrize("family", ["llama", "gptoss"])
def test_a_row_whose_scores_are_all_blocked_attends_to_nothing(family):
    """Token 0 sees key 0 alone: blocked, its heads give zeros, and all that comes out is finite."""
    model, _ = build(family)
    first = Edit(Site("scores", keys=0), "block")
    with torch.no_grad(), attach(model, [first, Observer("z")]) as attached:
        out = model(ids(1, 6)).logits
    assert out.isfinite().all()
    for _, _, z in attached.records["z"]:
        assert z.isfinite().all()
        assert not z[:, :, 0].any()
        assert z[:, :, 1:].any()
