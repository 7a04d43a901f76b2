"""A key that is moved is the model's own key there: by every rope type, every head by itself, and by several positions.

The oracle is the model at those positions. Moved all alike, tokens see each other as before: so every layer's keys are
known. Moved each by itself they are known in the first layer, which sees the tokens alone.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from regard.attaching.attachment import attach
from regard.attaching.ledger import LedgerLayer
from regard.attaching.policy import CachePolicy
from regard.attaching.selecting import rotate_first
from regard.core import Unsupported
from regard.testing.cache.script import full_cache
from regard.testing.zoo import TEXT, build

LENGTH = 5  # what sliding layers hold of a text that they see 6 tokens of
LONG = dict(original_max_position_embeddings=64)
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, **LONG),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **LONG),
}
CHANGING = {
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "longrope": dict(rope_type="longrope", factor=4.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4, **LONG),
}
# partial, of pairs that are neighbours, one table for each kind of layer, three positions a token
FAMILIES = ("neox", "phi", "qwen3", "gemma3", "gptoss", "smollm3", "qwen25vl", "qwen3vl")
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a key's length


def llama(rope):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, rope_parameters={"rope_theta": 1e4, **rope})).eval()


def glm():
    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    return tf.GlmForCausalLM(tf.GlmConfig(**TEXT, head_dim=8, rope_parameters=rope)).eval()


def cohere():
    torch.manual_seed(0)
    return tf.CohereForCausalLM(tf.CohereConfig(**TEXT)).eval()


MODELS = {
    **{name: lambda rope=rope: llama(rope) for name, rope in ROPES.items()},
    **{family: lambda family=family: build(family)[0] for family in FAMILIES},
    "glm": glm,
    "cohere": cohere,
}


def inputs(model):
    """Ids of two rows, and their positions: three for a token where the model has as many."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 118, (2, LENGTH), generator=g)
    at = torch.arange(LENGTH).expand(2, -1) + torch.tensor([[0], [5]])
    if "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
        at = torch.stack([at, at + torch.arange(LENGTH) % 3, at + 2])
    return ids, at


def keys(model, ids, at):
    """[B, G, n, D] of every layer."""
    cache = full_cache(model)
    with torch.no_grad():
        model(input_ids=ids, position_ids=at, past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def turned(model, ids, at, by):
    """The same, moved on by `by` once they are stored."""
    with attach(model, "h2o", budget=1.0) as attached, torch.no_grad():
        model(input_ids=ids, position_ids=at, past_key_values=full_cache(model))
        layers, rotary = attached.context.caches.layers, attached.context.rotary
        for x in layers:  # tables that are known of another move are not those of this one
            rotary.rotate(rotary.owners[x], x.groups[0].k(), by + 1)
        return [rotary.rotate(rotary.owners[x], x.groups[0].k(), by) for x in layers]


def off(found, wanted):
    """The largest difference, in parts of a key's length."""
    return float(((found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)).max())


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Any attachment watches the rotary modules, not only those of methods that move keys."""
    init = CachePolicy.__init__

    def needing(self, method):
        init(self, method)
        self.needs_rotary = True

    monkeypatch.setattr(CachePolicy, "__init__", needing)


@pytest.mark.parametrize("by", [11, -2])
@pytest.mark.parametrize("name", MODELS)
def test_all_alike(name, by):
    model = MODELS[name]()
    ids, at = inputs(model)
    found = turned(model, ids, at + 2, torch.full((1, 1, LENGTH), by))
    wanted, before = keys(model, ids, at + 2 + by), keys(model, ids, at + 2)
    assert max(off(a, b) for a, b in zip(found, wanted, strict=True)) <= NEAR[torch.float32]
    assert off(before[0], wanted[0]) > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_each_token_row_and_head_by_itself(name):
    model = MODELS[name]()
    ids, at = inputs(model)
    heads = keys(model, ids, at)[0].shape[1]
    by = torch.randint(-3, 40, (2, heads, LENGTH), generator=torch.Generator().manual_seed(1))
    for some in (by, by[:, :1], by[:1], by[:1, :1]):
        found = turned(model, ids, at + 3, some)[0]
        for head in range(heads):
            wanted = keys(model, ids, at + 3 + some[:, min(head, some.shape[1] - 1)])[0]
            assert off(found[:, head], wanted[:, head]) <= NEAR[torch.float32], (tuple(some.shape), head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*ROPES, "neox", "glm", "gemma3"])
def test_in_half_precision(name, dtype):
    model = MODELS[name]().to(dtype)
    ids, at = inputs(model)
    found = turned(model, ids, at, torch.full((1, 1, LENGTH), 11))
    assert all(x.dtype == dtype for x in found)
    assert off(found[0], keys(model, ids, at + 11)[0]) <= NEAR[dtype]


@pytest.mark.parametrize("name", CHANGING)
def test_frequencies_that_change_with_the_length_are_refused(name):
    model = llama(CHANGING[name])
    with pytest.raises(Unsupported, match=f"rope type '{name}' changes its frequencies"):
        turned(model, *inputs(model), torch.ones(1, 1, LENGTH, dtype=torch.long))


def test_moved_keys_are_as_they_were_when_tokens_are_taken_back():
    layer, k = LedgerLayer(), torch.arange(8.0).view(1, 1, 4, 2)
    layer.update(k, k)
    group, layer.draft = layer.groups[0], True
    view = SimpleNamespace(k=group.k(), rotate=lambda x, by: x + by[..., None])
    rotate_first(view, torch.full((1, 1, 2), 5), SimpleNamespace(slots=group, ledger=layer))
    assert group.k()[0, 0, 1].tolist() == [7.0, 8.0] and not layer.plain
    layer.crop(-3)
    assert group.origin is None and torch.equal(group.k(), k[:, :, :1])
