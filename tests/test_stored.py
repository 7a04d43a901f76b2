"""Tokens that are stored packed: under any policy, saved and loaded, and their true bytes."""

import pytest
import torch

import regard
from regard import catalog
from regard.core import Unsupported
from regard.testing.cache.script import STEPS, play, script
from regard.testing.zoo import build

KIVI = "kivi:bits=2,group=4,residual=3"


def test_what_a_method_keeps_is_stored_as_its_codec_says():
    """A policy beside a codec whose rounding is none keeps and answers what it does alone, step by step."""
    model, _ = build("llama")
    feeds = script(STEPS, pads=(0, 6, 17))
    # the last one's heads part when they are packed already
    for policy in ("h2o:budget=12", "snapkv:budget=12,window=3+adakv", "knorm:budget=12+adakv"):
        plain = play(model, catalog.from_spec(policy), feeds)
        exact = play(model, catalog.from_spec(f"{policy}+kivi:bits=8,group=4,residual=2"), feeds)
        for a, b in zip(plain.outs, exact.outs, strict=True):
            assert float((a - b)[:, -1].abs().max()) < 5e-3


def test_a_saved_cache_goes_on(tmp_path):
    model, _ = build("llama")
    tokens = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    method = catalog.from_spec(f"h2o:budget=14+{KIVI}")
    with regard.attach(model, method), torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        for t in range(20, 25):
            model(tokens[:, t : t + 1], past_key_values=cache)
        regard.save_cache(cache, tmp_path / "cache.safetensors")
        goes_on = model(tokens[:, 25:26], past_key_values=cache).logits
    again = regard.load_cache(tmp_path / "cache.safetensors")
    with regard.attach(model, method), torch.no_grad():
        assert torch.equal(model(tokens[:, 25:26], past_key_values=again).logits, goes_on)


def test_bytes_are_counted_by_hand():
    """40 tokens, of which 36 are packed: 9 chunks of 4; 4 layers' heads as the configuration says."""
    model, _ = build("llama")
    config = model.config
    with regard.attach(model, catalog.from_spec(KIVI)) as attached, torch.no_grad():
        model(torch.randint(3, 100, (1, 40)), use_cache=True)
        stored = attached.bytes_stored()
    width, packed = config.hidden_size // config.num_attention_heads, 36
    codes = 2 * packed * width // 4
    scales = (packed // 4) * width * 2 * 4 + packed * (width // 4) * 2 * 4
    exact = 2 * (40 - packed) * width * 4
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert stored == heads * (codes + scales + exact)


def test_two_bits_take_a_fifth_of_bfloat16():
    """At 32,768 tokens, heads of 64, with the paper's groups and residual; tables and room to grow left out."""
    from regard.attaching.packed import PackedGroup
    from regard.attaching.slots import Group

    method = catalog.method("kivi")
    k = torch.randn(1, 1, 32768, 64, dtype=torch.bfloat16)
    group = PackedGroup.of(Group((0,), k, k.clone(), 32768), method.page.codec(method.config))
    whole = group.stored_bytes()
    assert group.pack(None, {})
    assert group.stored_bytes() <= 0.2 * whole


def test_heads_part_with_what_they_have_packed():
    """Some tokens of each chunk gone, then heads of 9 and 6 tokens: each has the very numbers that it had before."""
    from regard.attaching.packed import PackedGroup
    from regard.attaching.slots import Group, Kept

    method, g = catalog.method("kivi", bits=2, group=4, residual=2), torch.Generator().manual_seed(0)
    k = (
        torch.randn(1, 2, 26, 8, generator=g) * torch.arange(1.0, 27)[:, None]
    )  # each chunk has a scale of its own
    group = PackedGroup.of(Group((0, 1), k, k.clone(), 26), method.page.codec(method.config))
    assert group.pack(None, {})
    stay = torch.stack([torch.arange(1, 26, 2), torch.arange(0, 26, 2)])[None]
    group.keep(Kept(stay))
    before, lengths = group.kv(), [9, 6]
    slots = torch.full((1, 2, 9), -1)
    slots[0, 0], slots[0, 1, :6] = torch.arange(2, 11), torch.arange(4, 10)
    for part in group.split(lengths, Kept(slots)):
        (head,), n = part.heads, part.n
        for packed, whole in zip(part.kv(), before, strict=True):
            assert n == lengths[head]
            assert torch.equal(packed[0, 0], whole[0, head, slots[0, head, :n]])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("streaming_llm+kivi", "moves stored keys"),
        ("kivi:bits=2+kivi", "laid over another method"),
        ("h2o+kivi+kivi", "laid over another once"),
        ("streaming_llm+adakv", "has none"),
        ("h2o+snapkv", "chooses by itself"),
    ],
)
def test_what_cannot_be_laid_over_is_refused(spec, said):
    with pytest.raises((Unsupported, ValueError), match=said):
        catalog.from_spec(spec)


def test_a_width_that_groups_do_not_divide_is_refused():
    model, _ = build("llama")
    method = catalog.method("kivi", bits=2, group=6, residual=0)
    with torch.no_grad(), regard.attach(model, method), pytest.raises(ValueError, match="multiple"):
        model(torch.randint(3, 100, (1, 12)), use_cache=True)


def test_settings_find_their_part():
    method = catalog.from_spec("snapkv:window=5+adakv:floor=0.3")
    assert (method.config.window, method.config.adakv.floor) == (5, 0.3)
    assert method.label == "snapkv+adakv(window=5, adakv.floor=0.3)"
    assert catalog.method("adakv", floor=0.3, budget=9).config.adakv.floor == 0.3
    with pytest.raises(ValueError, match="no setting 'flor'"):
        catalog.method("snapkv+adakv", flor=0.3)


def test_names_beside_one_another_are_laid_over():
    model, _ = build("llama")
    tokens = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(1))
    with regard.attach(model, ["snapkv", "adakv"], budget=8, window=3) as attached, torch.no_grad():
        model(tokens, use_cache=True)
        heads = attached.stored()
    assert all(sum(layer) == 8 * len(layer) for layer in heads)
    assert len({n for layer in heads for n in layer}) > 1
    parts = [catalog.method("snapkv", budget=8, window=3), catalog.method("adakv")]
    with regard.attach(model, parts) as attached, torch.no_grad():
        model(tokens, use_cache=True)
        assert attached.stored() == heads
    with pytest.raises(ValueError, match="has its settings itself"):
        regard.attach(model, [parts[0], catalog.method("adakv", budget=9)])
    with pytest.raises(Unsupported, match="one cache method at a time"):
        regard.attach(model, ["snapkv", "h2o"])
