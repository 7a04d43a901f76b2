"""A model whose scores have a scale of its own: every attention of regard's gives its logits, by that scale."""

from functools import cache

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from regard import catalog
from regard.attaching import masking
from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.views import make_view
from regard.core import Edit, Observer, Site
from regard.core.mask import window
from regard.testing.cache.script import NEAR, script
from regard.testing.zoo import TEXT, build

SCALE = 0.9  # one over the root of the width is 0.35
ALL = window(1 << 20)


@cache
def granite(scale=SCALE):
    torch.manual_seed(0)
    model = tf.GraniteForCausalLM(tf.GraniteConfig(**TEXT, attention_multiplier=scale)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


@cache
def gemma():
    """A softcap beside the scale, which mechanisms refuse."""
    return build("gemma2")[0]


def run(model, feeds, methods):
    with attach(model, methods), torch.no_grad():
        cache = DynamicCache()
        return [model(**feed, past_key_values=cache).logits for feed in feeds]


@cache
def own(make, steps, pads):
    """The logits of a model by itself, of a script: asked once for all ways."""
    return torch.cat(run(make(), script(steps, pads), None), 1)


def neutral(name):
    # words that a tokenizer would give, as token ids
    given = catalog.get(name).test_settings[0] if catalog.get(name).reread else {}
    method = catalog.method(name, **given)
    return method.with_settings(**method.page.card.neutral)


CACHES = catalog.list_methods(kind="cache")
WAYS = {
    **{name: [neutral(name)] for name in CACHES},
    "scores are edited": [Edit(Site("scores"), "scale", 1.0)],
    "weights are edited": [Edit(Site("weights", rows=-1), "scale", 1.0)],
    "a mask": [ALL],
}
MECHANISMS = {
    "softmax": ["softmax"],
    "lean_attention": ["lean_attention"],
    "prefill beside a policy": ["lean_attention", catalog.method("h2o", budget=1.0)],
    "block_topk": [catalog.method("block_topk", top_k=2**40, block_q=4, block_k=4)],
    "vertical_slash": [catalog.method("vertical_slash", vertical=64, slash=128, block_q=4, block_k=4)],
}


@pytest.mark.parametrize("pads", [(0, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("way", [*WAYS, *MECHANISMS])
def test_granite(way, pads):
    steps = (12, 1, 3, 1)
    wanted, feeds = own(granite, steps, pads), script(steps, pads)
    found = run(granite(), feeds, {**WAYS, **MECHANISMS}[way])
    real = feeds[-1]["attention_mask"].bool()
    wrong = (torch.cat(found, 1) - wanted)[real].abs().max()
    assert float(wrong) <= NEAR


def test_the_scale_matters():
    feeds = script((12,), (0,))
    own, usual = (run(granite(scale), feeds, None)[0] for scale in (SCALE, 8**-0.5))
    assert float((own - usual).abs().max()) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_gemma(way):
    wanted = own(gemma, (5, 1), (0, 0))
    found = run(gemma(), script((5, 1), (0, 0)), WAYS[way])
    assert float((torch.cat(found, 1) - wanted).abs().max()) <= NEAR


@pytest.mark.parametrize("hides", [False, True], ids=["all is seen", "a window"])
def test_a_mask_over_blocks(hides, monkeypatch):
    """A prompt over blocks, and single tokens over the keys that are read, as a dense mask has them."""
    mask = window(40) if hides else ALL
    model, feeds = granite(), script((520, 1, 1), (0, 0))
    outs = []
    for short in (4, 1 << 20):
        monkeypatch.setattr(masking, "SHORT", short)
        outs.append(torch.cat(run(model, feeds, [mask]), 1))
    assert float((outs[0] - outs[1]).abs().max()) <= NEAR


def test_observed_weights():
    model, feed = granite(), script((9,), (0,))[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(**feed, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")  # as it was, for other tests
    with attach(model, Observer("last_row")) as attached, torch.no_grad():
        model(**feed)
    for layer, _, row in attached.records["last_row"]:
        assert float((row - wanted[layer][:, :, -1]).abs().max()) <= NEAR


def test_a_model_that_hands_no_scale_is_viewed_with_the_root_of_its_heads():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    scale = {
        given: make_view(AttentionCall(None, None, q, k, k, None, {"scaling": given}, None)).scale
        for given in (None, 0.7)
    }
    assert scale == {None: 0.25, 0.7: 0.7}
