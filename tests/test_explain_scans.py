"""Scans: patching, attribution and paths against loops by hand, and laws that any of them obeys."""

import pytest
import torch
import transformers as tf

from regard.attaching.attachment import attach
from regard.core import Edit, Site
from regard.explaining.attribution import attribute, screen
from regard.explaining.pairs import Batch, Pairs, batch_of, make_pairs, prob
from regard.explaining.patching import patch
from regard.explaining.paths import LOGITS, Node, all_senders, path_patch
from regard.explaining.runs import capture
from regard.ops.ranks import rank_correlation
from regard.testing.tiny import TEXT
from regard.testing.zoo import build

FAMILIES = ("llama", "qwen3", "gemma2", "neox", "gpt2")
MORE = {
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**TEXT)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**TEXT)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**TEXT, residual_multiplier=0.22)),
}


def tiny(name):
    if name not in MORE:
        return build(name)[0]
    torch.manual_seed(0)
    model = MORE[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


def random_pairs(count=3, n=9, changed=(3,), lengths=None):
    """Pairs that differ at some tokens; of unequal lengths they are padded to the left."""
    g = torch.Generator().manual_seed(0)
    clean = [torch.randint(3, 118, (m,), generator=g).tolist() for m in (lengths or [n] * count)]
    corrupt = [[(t + 50) % 115 + 3 if i in changed else t for i, t in enumerate(c)] for c in clean]
    count = len(clean)
    return Pairs(batch_of(clean), batch_of(corrupt), torch.full((count,), 7), torch.full((count,), 9))


def score(pairs, logits, i):
    return float(logits[pairs.target[i]] - logits[pairs.foil[i]])


@torch.no_grad()
def alone(model, ids, edits=()):
    with attach(model, list(edits) or None):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def texts(batch):
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask)]


# -- patching


@pytest.mark.parametrize("quantity", ["z", "q", "k", "v", "out", "mlp", "resid_post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_is_the_loop_over_pairs_and_sites(family, quantity):
    """Unequal lengths in one batch: every pair alone, every site alone, by a single edit."""
    model, pairs = tiny(family), random_pairs(lengths=(9, 6, 8))
    found = patch(model, pairs, quantity)
    for i, (clean, corrupt) in enumerate(zip(texts(pairs.clean), texts(pairs.corrupt))):
        _, given = capture(model, Batch(torch.tensor([clean]), torch.ones(1, len(clean))), [quantity])
        base = score(pairs, alone(model, corrupt), i)
        assert float(found.span[i]) == pytest.approx(score(pairs, alone(model, clean), i) - base, abs=2e-5)
        for layer, x in given[quantity].items():
            heads = range(x.shape[1]) if "head" in found.dims else [None]
            for h in heads:
                value = x[:, h or 0][:, None] if h is not None else x[:, 0]
                edit = Edit(Site(quantity, layers=layer, heads=h), "replace", value)
                wanted = score(pairs, alone(model, corrupt, [edit]), i) - base
                site = (layer,) if h is None else (layer, h)
                assert float(found.at(site)[i]) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_the_whole_state_restores_all(family, direction):
    model, pairs = tiny(family), random_pairs(lengths=(9, 7))
    effects = patch(model, pairs, "resid_post", direction=direction)
    torch.testing.assert_close(effects.mean, torch.ones_like(effects.mean), rtol=0, atol=1e-4)
    same = Pairs(pairs.clean, pairs.clean, pairs.target, pairs.foil)
    with pytest.raises(ValueError, match="differs between clean and corrupted"):
        patch(model, same, "z")


def test_rows_tokens_and_sites():
    """The token that differs restores all in the first layer; before it nothing; the last alone in the last layer."""
    model, pairs = tiny("llama"), random_pairs(3, 9, changed=(3,))
    by_token = patch(model, pairs, "resid_pre", tokens=range(9))
    assert by_token.dims == ("layer", "token")
    wanted = torch.zeros(9, dtype=torch.float64)
    wanted[3] = 1
    torch.testing.assert_close(by_token.mean[0], wanted, rtol=0, atol=1e-4)
    assert float(by_token.mean[:, :3].abs().max()) <= 1e-5
    last = patch(model, pairs, "resid_post", rows=-1)
    assert float(last.mean[-1]) == pytest.approx(1, abs=1e-4)
    some = patch(model, pairs, "z", sites=[(1, 2), (2, 0)])
    whole = patch(model, pairs, "z")
    assert some.exact.sum() == 2 and bool(some.mean[0].isnan().all())
    assert float(some.at((1, 2)).sub(whole.at((1, 2))).abs().max()) <= 1e-6


def test_unequal_prompts_are_aligned():
    """A prompt with a token more in front, aligned from the end: the last state is the other one."""
    model = tiny("llama")
    corrupt, clean = [5, 9, 23, 40, 8], [77, 5, 9, 60, 40, 8]
    pair = lambda align: Pairs(  # noqa: E731
        batch_of([clean]), batch_of([corrupt]), torch.tensor([7]), torch.tensor([9]), align
    )
    at = torch.arange(1, 6)[None]
    effects = patch(model, pair(at), "resid_post")
    # every token but the first of the clean prompt is given: the last layer's last token decides
    assert float(effects.mean[-1]) == pytest.approx(1, abs=1e-4)
    part = torch.tensor([[-1, -1, -1, 4, -1]])
    assert abs(float(patch(model, pair(part), "resid_post").mean[-1])) <= 1e-5
    for method in (lambda: attribute(model, pair(at), ["z"], steps=2),):
        with pytest.raises(ValueError, match="of one length"):
            method()


def test_a_killed_scan_goes_on(tmp_path):
    model, pairs = tiny("llama"), random_pairs(3, 9)
    whole = patch(model, pairs, "z", batch=2)
    calls = []

    class Stop(Exception):
        pass

    def stop(done, total):
        calls.append(done)
        if len(calls) == 5:
            raise Stop

    with pytest.raises(Stop):
        patch(model, pairs, "z", batch=2, folder=tmp_path / "scan", progress=stop)
    # a line cut short, as a kill leaves it
    rows = tmp_path / "scan" / "results.jsonl"
    before = rows.read_text().splitlines()
    rows.write_text("\n".join(before) + '\n{"key": "half')
    again = patch(model, pairs, "z", batch=2, folder=tmp_path / "scan")
    assert torch.equal(again.values, whole.values)
    after = rows.read_text().splitlines()
    assert after[: len(before)] == before and len({*after}) == len(after)
    with pytest.raises(ValueError, match="of the same run"):
        patch(model, pairs, "q", folder=tmp_path / "scan")


# -- attribution


def linear_model():
    """A Llama without queries, so attention is uniform; norms and MLPs are made linear by hooks of its own."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.forward = lambda x, w=module.weight: x * w * 0.7
        if "MLP" in type(module).__name__:
            module.forward = lambda x, m=module: m.down_proj(m.up_proj(x))
    return model


@pytest.mark.parametrize("quantity", ["z", "v", "out", "mlp", "resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_attribution_is_exact_on_a_linear_model(quantity, direction):
    model, pairs = linear_model(), random_pairs(lengths=(9, 6, 8))
    for steps in (0, 2):
        found = attribute(model, pairs, [quantity], steps=steps, direction=direction)[quantity]
        wanted = patch(model, pairs, quantity, direction=direction)
        assert float((found.values - wanted.values).abs().max()) <= 1e-10
        assert float(wanted.values.abs().max()) > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
@pytest.mark.parametrize("quantity", ["z", "q", "k", "v", "out", "mlp", "resid_post"])
def test_attribution_is_the_gradient(family, quantity):
    """A step of a thousandth towards the other prompt changes the metric as attribution says, on every family."""
    model, pairs = tiny(family).double(), random_pairs(2, 7)
    found = attribute(model, pairs, [quantity])[quantity]
    _, clean = capture(model, pairs.clean, [quantity])
    _, corrupt = capture(model, pairs.corrupt, [quantity])
    step = 0.005  # norms are computed in float32
    layer = 1
    x, y = clean[quantity][layer], corrupt[quantity][layer]
    x, y = (t if "head" in found.dims else t[:, 0] for t in (x, y))
    ends = []
    for sign in (1, -1):
        edit = Edit(Site(quantity, layers=layer, tower="text"), "add", sign * step * (x - y))
        with torch.no_grad(), attach(model, edit):
            ends.append(model(input_ids=pairs.corrupt.ids, use_cache=False).logits[:, -1])
    moved = (ends[0] - ends[1]).gather(1, pairs.target[:, None]) - (ends[0] - ends[1]).gather(
        1, pairs.foil[:, None]
    )
    slope = moved[:, 0] / (2 * step)
    total = found.values[:, layer]
    total = total.sum(-1) if total.dim() > 1 else total
    torch.testing.assert_close(total, slope, rtol=2e-2, atol=3e-5)


def test_effects_by_token_add_up():
    model, pairs = tiny("gemma2"), random_pairs(3, 9)
    by_token = attribute(model, pairs, ["z", "mlp"], by_token=True)
    whole = attribute(model, pairs, ["z", "mlp"])
    for q in ("z", "mlp"):
        torch.testing.assert_close(by_token[q].summed("token").values, whole[q].values)
    assert list(by_token["z"].coords["token"]) == list(range(-9, 0))
    with pytest.raises(ValueError, match="equally long"):
        attribute(model, random_pairs(lengths=(9, 6)), ["z"], by_token=True)


def saturated():
    """A model one of whose heads attends to one key alone: the gradient through its softmax is nothing."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.div_(60)
        model.model.layers[1].self_attn.q_proj.weight[16:24] *= 60 * 2000
    return model


def test_a_saturated_head_is_found_with_the_qk_correction():
    """Head 2 of layer 1 switches to another key when its query is patched; without the correction it is missed."""
    model, pairs = saturated(), random_pairs(6, 9, changed=(8,))
    exact = patch(model, pairs, "q")
    plain, corrected = (attribute(model, pairs, ["q"], qk=qk)["q"] for qk in (False, True))
    site = (1, 2)
    truth = float(exact.at(site).abs().mean())
    assert truth > 0.01
    missed = float((plain.at(site) - exact.at(site)).abs().mean())
    found = float((corrected.at(site) - exact.at(site)).abs().mean())
    assert missed > 0.8 * truth
    assert found < 0.5 * truth
    assert exact.top(1) == corrected.top(1) == [site]
    assert plain.top(1) != [site]


def test_the_qk_correction_is_exact_where_what_follows_is_linear():
    """Queries and keys of a model that is linear but for its softmaxes, in its last layer."""
    model = linear_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    pairs = random_pairs(3, 9)
    for q in ("q", "k"):
        exact = patch(model, pairs, q, layers=[2])
        found = attribute(model, pairs, [q], qk=True)[q]
        gap = (found.values[:, 2] - exact.values[:, 0]).abs().max()
        assert float(gap) <= 1e-9
        plain = attribute(model, pairs, [q])[q]
        assert float((plain.values[:, 2] - exact.values[:, 0]).abs().max()) > 1e-6


def test_screen_measures_the_largest_exactly():
    model, pairs = tiny("llama"), random_pairs(3, 9)
    both, exact = screen(model, pairs, verify=4), patch(model, pairs, "z")
    assert int(both.exact.sum()) == 4
    assert torch.allclose(both.values[:, both.exact], exact.values[:, both.exact], atol=1e-6)
    estimated = attribute(model, pairs, ["z"])["z"]
    assert torch.equal(both.values[:, ~both.exact], estimated.values[:, ~both.exact])


# -- paths


@pytest.mark.parametrize("mlps", ["frozen", "free"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "neox", "gpt2", "olmo2", "cohere"])
def test_paths_by_hand(family, mlps):
    """Sender to receiver by hand: the residual at the receiver is the clean one and what the sender changed."""
    model, pairs = tiny(family), random_pairs(2, 8, changed=(3, 7))
    sender = Node("z", 0, 1)
    receivers = [Node("q", 2, 3)]
    found = path_patch(model, pairs, receivers, [sender, Node("mlp", 0)], mlps=mlps)
    wanted = path_by_hand(model, pairs, sender, receivers[0], mlps == "free").double()
    torch.testing.assert_close(found.values[:, 0], wanted, rtol=1e-3, atol=2e-6)
    assert float(wanted.abs().max()) > 1e-6


def path_by_hand(model, pairs, sender, receiver, free):
    run = lambda ids, edits=(): forwarded(model, ids, edits)  # noqa: E731
    _, clean = capture(model, pairs.clean, ["z", "mlp", "resid_pre", "out"])
    _, corrupt = capture(model, pairs.corrupt, ["z"])
    # what the sender adds to the residual instead: its layer alone
    one = clean["z"][sender.layer].clone()
    one[:, sender.head] = corrupt["z"][sender.layer][:, sender.head]
    _, moved = capture_beside(
        model, pairs.clean, ["out"], Edit(Site("z", layers=sender.layer), "replace", one)
    )
    delta = (moved["out"][sender.layer] - clean["out"][sender.layer])[:, 0]
    edits = []
    if not free:
        pre = clean["resid_pre"][receiver.layer][:, 0] + delta
        edits = [Edit(Site("resid_pre", layers=receiver.layer), "replace", pre)]
    else:
        for layer in range(receiver.layer):
            edits.append(
                Edit(Site("z", layers=layer), "replace", one if layer == sender.layer else clean["z"][layer])
            )
    _, seen = capture_beside(model, pairs.clean, [receiver.quantity], *edits)
    x = seen[receiver.quantity][receiver.layer][:, receiver.head][:, None]
    edit = Edit(Site(receiver.quantity, layers=receiver.layer, heads=receiver.head), "replace", x)
    before, after = run(pairs.clean.ids), run(pairs.clean.ids, [edit])
    return pairs.score(before) - pairs.score(after)


@torch.no_grad()
def forwarded(model, ids, edits):
    with attach(model, list(edits) or None):
        return model(input_ids=ids, use_cache=False).logits[:, -1]


@torch.no_grad()
def capture_beside(model, batch, quantities, *edits):
    from regard.explaining.runs import forward, observers, values_of

    logits, attached = forward(model, batch, [*edits, *observers(quantities)])
    return logits, values_of(attached.records, quantities)


def test_paths_to_the_logits_add_up_on_a_linear_model():
    """Direct effects of all heads and MLPs, and of the embeddings, are the whole difference."""
    model, pairs = linear_model(), random_pairs(3, 9)
    direct = path_patch(model, pairs, [LOGITS])
    logits_of = lambda ids: pairs.score(forwarded(model, ids, ()))  # noqa: E731
    _, clean = capture(model, pairs.clean, ["resid_pre"])
    _, corrupt = capture(model, pairs.corrupt, ["resid_pre"])
    change = (clean["resid_pre"][0] - corrupt["resid_pre"][0])[:, 0, -1]
    head = model.lm_head.weight @ (model.model.norm.weight * 0.7 * change).T
    embedding = head.gather(0, pairs.target[None]) - head.gather(0, pairs.foil[None])
    total = direct.values.sum(1) + embedding[0]
    wanted = logits_of(pairs.clean.ids) - logits_of(pairs.corrupt.ids)
    torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-9)


def test_paths_that_are_not_there():
    model, pairs = tiny("neox"), random_pairs(2, 8)
    with pytest.raises(ValueError, match="a sender comes before"):
        path_patch(model, pairs, [Node("mlp", 1)], [Node("z", 1, 0)])
    assert Node("z", 1, 0) in all_senders(tiny("llama"), Node("mlp", 1))
    assert Node("z", 1, 0) not in all_senders(model, Node("mlp", 1))
    with pytest.raises(ValueError, match="a receiver alone"):
        path_patch(model, pairs, [LOGITS, Node("q", 1, 0)])


# -- what is asked


class Words:
    """A tokenizer of single words, for prompts of a test."""

    pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [3 + sum(map(ord, w)) % 100 for w in text.split()]

    def decode(self, ids):
        return str(ids[0])


def test_bad_prompts_are_refused():
    tokenizer = Words()
    with pytest.raises(ValueError, match="equally long"):
        make_pairs(tokenizer, ["a b c"], ["a b"], ["x"])
    with pytest.raises(ValueError, match="the target is one token"):
        make_pairs(tokenizer, ["a b c"], ["a b d"], ["x y"])
    with pytest.raises(ValueError, match="the foil is one token"):
        make_pairs(tokenizer, ["a b c"], ["a b d"], ["x"], [""])
    with pytest.raises(ValueError, match="are in their prompts"):
        make_pairs(tokenizer, ["a b c"], ["a b"], ["x"], align=[(3, 1)])
    pairs = make_pairs(tokenizer, ["a b c", "d e"], ["a b", "e d"], ["x", "y"], align="end")
    assert pairs.align.tolist() == [[1, 2], [1, 2]]
    model = tiny("llama")
    with pytest.raises(ValueError, match="layers of this model"):
        patch(model, random_pairs(), "z", layers=[7])
    with pytest.raises(ValueError, match="sites are layer, head"):
        patch(model, random_pairs(), "z", sites=[(1, 9)])
    with pytest.raises(ValueError, match="a scan patches"):
        patch(model, random_pairs(), "weights")
    constant = random_pairs()
    constant = Pairs(constant.clean, constant.corrupt, constant.target, metric=lambda x, t, f: x[:, 0] * 0)
    with pytest.raises(ValueError, match="the metric differs"):
        attribute(model, constant, ["z"])


def test_intervals_and_axes():
    model, pairs = tiny("llama"), random_pairs(12, 9)
    effects = patch(model, pairs, "z")
    low, high = effects.interval()
    assert bool(((low <= effects.mean) & (effects.mean <= high)).all())
    one = patch(model, pairs.at([0]), "z")
    assert bool(one.interval()[0].isnan().all())
    assert effects.to_dict()["dims"] == ["layer", "head"]
    xarray = pytest.importorskip("xarray")
    data = effects.to_xarray()
    assert isinstance(data, xarray.Dataset) and dict(data.sizes)["head"] == 4
    assert float(data["mean"].sel(layer=1, head=2)) == pytest.approx(float(effects.mean[1, 2]))


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (40,), generator=g), torch.randn(40, generator=g)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_probabilities_are_a_metric():
    model, pairs = tiny("llama"), random_pairs(3, 9)
    asked = Pairs(pairs.clean, pairs.corrupt, pairs.target, metric=prob)
    effects = patch(model, asked, "resid_post")
    torch.testing.assert_close(effects.mean, torch.ones(3).double(), rtol=0, atol=1e-3)


def test_integrated_gradients_are_complete():
    """What the embeddings do along the whole line is the difference of both prompts; at its start alone it is not."""
    model, pairs = tiny("llama"), random_pairs(2, 7)
    gaps = []
    for steps in (0, 48):
        found = attribute(model, pairs, ["resid_pre"], steps=steps)["resid_pre"]
        gaps.append(float(((found.at((0,)) - found.span) / found.span).abs().max()))
    assert gaps[1] <= 0.02 < 0.1 < gaps[0]
