"""Hybrid models and models with shared keys: the checks of each family, faults that they must find, and refusals."""

import copy

import pytest
import torch
from transformers import Gemma3nForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicIndexedLayer, StaticCache

import regard
from regard import catalog
from regard.attaching import caches, hybrid_layer
from regard.attaching.attachment import attach
from regard.attaching.hybrid_layer import HybridLedgerLayer
from regard.attaching.ledger import LedgerLayer
from regard.attaching.sharing import Lent, readers_of
from regard.attaching.step import Step
from regard.core import Edit, Observer, Site, Unreachable, Unsupported
from regard.testing.cache.checks import check_generation
from regard.testing.cache.family import attention_layers, check_family
from regard.testing.cache.oracle import hide
from regard.testing.cache.script import full_cache, ledgers, script
from regard.testing.zoo import HYBRIDS, build, ids

READERS = ("gemma3n", "gemma4", "gemma4unified")
H2O = catalog.method("h2o", budget=8)
# their states are not reordered by transformers when beams change, attached or not
NO_BEAMS = ("minimax", "recurrentgemma")


@pytest.mark.parametrize("family", HYBRIDS)
def test_family(family):
    check_family(family)


@pytest.mark.parametrize("family", ["zamba2", "gemma4", "nemotronh", "inkling"])
def test_beams_samples_and_chunks(family):
    check_generation(H2O, family)


@pytest.mark.parametrize("family", NO_BEAMS)
def test_beams_that_transformers_itself_gets_wrong(family):
    """When this fails the family is mended there, and belongs to the others."""
    model, _ = build(family)
    tokens = ids(2, 12)
    settings = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None, output_scores=True)
    out = model.generate(tokens, return_dict_in_generate=True, **settings)
    with torch.no_grad():
        logits = model(out.sequences[:, :-1], use_cache=False).logits[:, 11:].log_softmax(-1)
    scores = logits.gather(-1, out.sequences[:, 12:, None])[..., 0].mean(-1)
    assert float((scores - out.sequences_scores).abs().max()) > 1e-4


# -- what the family's checks cannot see


@pytest.mark.parametrize("family", READERS)
def test_readers_vote_with_their_last_query(family):
    """H2O's sum at a layer whose keys others read: of its own queries all, of theirs the last in each step."""
    model, _ = build(family)
    feeds, weights = script(steps=(20, 1, 4), pads=(0,)), {}

    def note(layer, quantity, x, seen):
        if quantity == "weights":
            weights.setdefault(layer, []).append(x)
        return x

    hide(model, feeds, change=note)
    with attach(model, "h2o", budget=1.0) as attached, torch.no_grad():
        cache = full_cache(model)
        for feed in feeds:
            model(**feed, past_key_values=cache)
    readers = readers_of(model.config)
    assert readers == {0: (3,), 2: (4,)}
    for layer, ledger in ledgers(attached).items():
        wanted = torch.zeros(1, 4, 25)
        for own, *others in zip(weights[layer], *(weights[r] for r in readers.get(layer, ()))):
            for w in (own, *(other[:, :, -1:] for other in others)):
                wanted[..., : w.shape[-1]] += w.sum(2)
        group = ledger.groups[0]
        got, wanted = group.note("received"), wanted[..., group.table()[0, 0]]
        torch.testing.assert_close(got, wanted.unflatten(1, (2, 2)).sum(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", READERS)
def test_shared_keys_are_held_once_and_read_by_each(family):
    model, _ = build(family)
    feeds = script(steps=(20,), pads=(0,))
    with torch.no_grad():
        model(**feeds[0], past_key_values=(own := DynamicCache(config=model.config)))
        full = sum(
            x.nbytes
            for layer in own.layers
            if getattr(layer, "keys", None) is not None
            for x in (layer.keys, layer.values)
        )
        for method, settings in ((None, {}), ("h2o", dict(budget=1.0))):
            with attach(model, method, **settings) as attached:
                model(**feeds[0], past_key_values=DynamicCache(config=model.config))
                by_layer = [layer.bytes_stored() for layer in ledgers(attached).values()]
                assert attached.bytes_stored() == sum(by_layer) == full
                # layer 0 slides: of the prompt's 20 tokens that it read, 5 are left
                first = by_layer[0] * (1 if method is None else 4)
                assert attached.bytes_read() == 2 * first + by_layer[1] + 2 * by_layer[2]
                assert len(attached.stored()) == 3


@pytest.mark.parametrize("family", ["gemma4", "gemma4unified"])
def test_a_prompt_of_which_readers_compute_the_last_query_alone(family):
    """logits_to_keep=1, as generate() passes it: the same tokens stay, and rows are those of the text."""
    model, _ = build(family)
    feed = script(steps=(20,))[0]
    edits = [
        Edit(Site("z", layers=4, rows=(-1,)), "scale", 3.0),
        Edit(Site("z", layers=4, rows=0), "scale", 9.0),
    ]
    outs, stored = [], []
    for keep in (0, 1):
        with attach(model, [H2O, Observer("z", Site("z", layers=3, rows=(0, -1))), edits[0]]) as attached:
            with torch.no_grad():
                outs.append(
                    model(**feed, past_key_values=full_cache(model), logits_to_keep=keep).logits[:, -1]
                )
            stored.append([g.table() for layer in ledgers(attached).values() for g in layer.groups])
            assert attached.records["z"][0][2].shape[2] == 2 - keep
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*stored, strict=True))
    with pytest.raises(regard.core.NeverFired, match="rows"), attach(model, edits[1]), torch.no_grad():
        model(**feed, past_key_values=full_cache(model), logits_to_keep=1)


@pytest.mark.parametrize("family", ["falconh1", "zaya", "inkling"])
def test_a_cache_filled_without_an_attachment_keeps_its_states(family):
    model, _ = build(family)
    feeds = script(steps=(12, 1, 3))
    with torch.no_grad():
        cache, wanted = full_cache(model), []
        for feed in feeds:
            wanted.append(model(**feed, past_key_values=cache).logits)
        cache = full_cache(model)
        model(**feeds[0], past_key_values=cache)
        with attach(model, "h2o", budget=1.0):
            model(**feeds[1], past_key_values=cache)
            other = copy.deepcopy(cache)
        # and goes on without one
        result = model(**feeds[2], past_key_values=cache).logits
        assert isinstance(cache.layers[0], HybridLedgerLayer)
        again = model(**feeds[2], past_key_values=other).logits
    torch.testing.assert_close(result, wanted[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(again, result, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["falconh1", "zamba2", "minimax", "gemma3n", "gemma4"])
def test_the_cache_that_the_model_makes(family):
    """Two calls of generate() on a model's own cache, sliding layers included, under a full budget."""
    model, _ = build(family)
    tokens, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    written = []
    for method in (None, H2O.with_settings(budget=1.0)):
        with attach(model, method):
            first = model.generate(input_ids=tokens, attention_mask=mask, **settings)
            text = torch.cat([first.sequences, tokens[:, :4]], 1)
            more = torch.cat([mask, mask.new_ones(2, 9)], 1)
            second = model.generate(
                input_ids=text, attention_mask=more, past_key_values=first.past_key_values, **settings
            )
            written.append(second.sequences)
    assert torch.equal(*written)


def test_numbers_of_layers_are_the_models():
    assert attention_layers(build("zamba2")[0]) == [1, 3]
    assert attention_layers(build("nemotronh")[0]) == [1, 4]
    assert attention_layers(build("gemma4")[0]) == [0, 1, 2, 3, 4]


def test_calibrated_heads_are_those_of_cache_layers():
    """Heads of layers that read another's keys count for the keys that they read."""
    model, _ = build("gemma3n")
    with attach(model, "razor_attention", budget=0.5) as attached, torch.no_grad():
        model(**script(steps=(20,), pads=(0,))[0], past_key_values=full_cache(model))
        heads = next(a for a in attached.actors if a.needs_cache).method.config.heads
    assert sorted(heads) == [(layer, head) for layer in range(3) for head in range(2)]


# -- a mechanism in the place of attention


@pytest.mark.parametrize("family", ["falconh1", "zamba2"])
def test_a_mechanism_leaves_the_states_alone(family):
    """Softmax as a mechanism is the model: its state and the model's states live in one layer."""
    model, _ = build(family)
    tokens = ids(2, 14)
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = model.generate(tokens, **settings)
    with attach(model, "softmax"):
        assert torch.equal(model.generate(tokens, **settings), plain)
        assert torch.equal(model.generate(tokens, num_beams=2, **settings)[:, :14], tokens)


def test_a_mechanism_with_a_state_does_not_read_anothers_keys():
    config = copy.deepcopy(build("gemma3n")[0].config)
    config.layer_types = ["full_attention"] * 5
    model = Gemma3nForCausalLM(config).eval()
    with (
        attach(model, "linear_attention"),
        pytest.raises(Unsupported, match=r"layers\.3.*another layer stored"),
    ):
        model.generate(ids(1, 8), max_new_tokens=2)


# -- refusals, by name


def test_a_model_without_attention_is_refused():
    config = Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8,
                          n_groups=1, chunk_size=8)  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    with pytest.raises(Unreachable, match=r"Mamba2ForCausalLM.*no layer has attention"), attach(model, H2O):
        pass
    found = regard.doctor(model)
    assert not found.reached
    assert found.recurrent == ("layer 0 (linear_attention)", "layer 1 (linear_attention)")


def test_layers_of_other_kinds_are_refused_by_name():
    model, _ = build("llama")
    feed = dict(input_ids=ids(1, 4))
    indexed = Cache(layers=[DynamicIndexedLayer() for _ in range(3)])
    with (
        pytest.raises(Unsupported, match="DynamicIndexedLayer, which holds more than keys"),
        attach(model, H2O),
    ):
        model(**feed, past_key_values=indexed)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(Unsupported, match="StaticLayer; use a dynamic cache"), attach(model, H2O):
        model(**feed, past_key_values=static)


def test_states_that_cannot_be_saved_are_named(tmp_path):
    for family, said in (
        ("minimax", "MiniMaxCache keeps states beside"),
        ("recurrentgemma", "in its modules"),
    ):
        model, _ = build(family)
        cache = full_cache(model)
        with attach(model, H2O), torch.no_grad():
            model(**script(steps=(4,), pads=(0,))[0], past_key_values=cache)
            with pytest.raises(Unsupported, match=said):
                regard.save_cache(cache, tmp_path / "cache.safetensors")


# -- faults planted in the machinery


def forgets_states(layer, old):
    return hybrid_layer.HYBRID[type(layer)]() if hybrid_layer.has_states(old) else layer


def evicts_before_readers(self, call):
    return [call] if call.turn.nth == 0 else []


def never_finds_the_owner(self, k, v):
    return None


def reads_the_wrong_layer(self, k, v, read=Lent.read):
    loan = read(self, k, v)
    return loan and next(x for x in self._loans.values() if x.layer is not None)


def states_stay_when_rows_change(self, rows):
    LedgerLayer._rows(self, rows)


FAULTS = {
    "states are lost": (caches, "beside_states", forgets_states, "falconh1"),
    "evicted before its readers": (Step, "asked", evicts_before_readers, "gemma4"),
    "the owner is not found": (Lent, "read", never_finds_the_owner, "gemma3n"),
    "another owner": (Lent, "read", reads_the_wrong_layer, "gemma4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, monkeypatch):
    owner, name, wrong, family = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, Unsupported, RuntimeError, KeyError, IndexError)):
        check_family(family)


def test_states_follow_beams(monkeypatch):
    monkeypatch.setattr(hybrid_layer.WithStates, "_rows", states_stay_when_rows_change)
    with pytest.raises(AssertionError, match="beams"):
        check_generation(H2O, "falconh1")
