"""A mechanism in the place of attention: state that carries, padding, turns, refusals, undo, conversion, disk."""

import dataclasses
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.test_attach import greedy, run, state
from transformers import AutoModelForCausalLM, DynamicCache

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted, load_converted, read_converted
from regard.attaching.replacement import sizes, state_bytes, without
from regard.attaching.store import save_cache
from regard.bench import conversion
from regard.bench.conversion import convert_folder
from regard.core import Edit, Observer, Site, Unsupported
from regard.models.shipped import SHIPPED, only_errors
from regard.ops.blocks import BlockSettings
from regard.testing.zoo import build, ids, logits
from regard.train import teachers
from regard.train.convert import convert, drawer

PLAIN = ("llama", "qwen3", "gpt2", "neox", "deepseek3", "qwen3next", "llava", "qwen25vl")
REFUSES = {
    "gemma2": "a softcap", "gemma3": "not plain causal", "gptoss": "attention sinks", "mistral": "not plain causal",
    "bert": "not plain causal", "whisper": "encoder-decoder", "t5": "encoder-decoder",
}  # fmt: skip
MECHANISMS = [(name, catalog.get(name)) for name in catalog.list_methods(kind="mechanism")]
LEARNED = [name for name, page in MECHANISMS if page.init and "causal_self" in page.patterns]
# what a token sees of a text depends on where the calls end for the others, by their definition
NAMES = [name for name in LEARNED if "decode" not in catalog.get(name).exempt]
# what chooses the keys that a prompt reads leaves the cache, and decoding, to the model
DECODING = [name for name in NAMES if not isinstance(catalog.get(name).config(), BlockSettings)]


def made(model, name, **config):
    """A conversion without training: every site's parameters as init gives them, moved a little."""
    method, dims = catalog.method(name, **config), sizes(model)
    torch.manual_seed(0)
    sites = [n for n, m in model.named_modules() if n.endswith(("self_attn", ".attn"))]
    params = {
        s: {n: p + 0.2 * torch.randn_like(p) for n, p in method.page.init(method.config, dims).items()}
        for s in sites
    }
    return Converted(method, params)


@pytest.mark.parametrize("name", PLAIN)
def test_softmax_in_the_place_of_attention_changes_nothing(name):
    model, inputs = build(name)
    expected, words = run(model, inputs), greedy(model, inputs)
    with attach(model, "softmax") as attached:
        assert (run(model, inputs) - expected).abs().max() <= 1e-5
        assert torch.equal(greedy(model, inputs), words)
    assert attached.bytes_held() > 0


@pytest.mark.parametrize("name", REFUSES)
def test_what_cannot_be_taken_over_is_refused_by_name(name):
    model, inputs = build(name)
    before = state(model)
    with pytest.raises(Unsupported, match=REFUSES[name]), attach(model, "softmax"):
        run(model, inputs)
    assert state(model) == before


def test_learned_parts_are_asked_for():
    model, _ = build("llama")
    with pytest.raises(Unsupported, match="convert first"):
        attach(model, "hedgehog")


@pytest.mark.parametrize(
    "beside", [Edit(Site(layers=1), "scale", 0.5), Observer("last_row"), "streaming_llm"]
)
def test_it_is_attached_alone(beside):
    model, _ = build("llama")
    with pytest.raises(Unsupported, match="takes the place of attention"):
        attach(model, [made(model, "hedgehog"), beside])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_from_the_state_is_reading_the_whole(name, family):
    model, inputs = build(family)
    converted = made(model, name)
    with attach(model, converted):
        words = greedy(model, inputs, max_new_tokens=8)
        whole = run(model, {"input_ids": words[:, :-1]}, use_cache=False)
        assert torch.equal(whole[:, 11:].argmax(-1), words[:, 12:])
        cache = DynamicCache(config=model.config)
        parts = [
            run(model, {"input_ids": part}, past_key_values=cache)
            for part in words[:, :-1].split([5, 1, 7, 6], 1)
        ]
        assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_left_padding_is_its_rows_alone(name):
    model, _ = build("llama")
    rows = ids(2, 10)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), rows[:1, :6]], 1), rows[1:]])
    mask = (padded > 0).long()
    with attach(model, made(model, name)):
        both = greedy(model, dict(input_ids=padded, attention_mask=mask))
        alone = greedy(model, dict(input_ids=rows[:1, :6])), greedy(model, dict(input_ids=rows[1:]))
        # features of rotated queries depend on where in the text they stand
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = run(model, dict(input_ids=padded, attention_mask=mask, position_ids=positions), use_cache=False)
        assert (out[0, 4:] - run(model, dict(input_ids=rows[:1, :6]))[0]).abs().max() <= 1e-5
    assert torch.equal(both[0, 10:], alone[0][0, 6:])
    assert torch.equal(both[1, 10:], alone[1][0, 10:])


@pytest.mark.parametrize("name", DECODING)
def test_bytes_are_those_declared(name):
    model, _ = build("llama")
    converted, held, lengths = made(model, name), [], (3, 12, 40)
    with attach(model, converted) as attached:
        for length in lengths:
            run(model, dict(input_ids=ids(1, length)))
            held.append(attached.bytes_held())
        assert attached.bytes_stored() == attached.bytes_read() == held[-1]
        assert attached.cache.get_seq_length() == 40
    assert held == [state_bytes(model, converted, length) for length in lengths]


@pytest.mark.parametrize("name", DECODING)
def test_turns_and_beams(name):
    model, inputs = build("llama")
    with attach(model, made(model, name)):
        cache = DynamicCache(config=model.config)
        first = greedy(model, inputs, past_key_values=cache)
        second = torch.cat([first, ids(1, 4)], 1)
        assert torch.equal(
            greedy(model, dict(input_ids=second), past_key_values=cache),
            greedy(model, dict(input_ids=second)),
        )
        beams = greedy(model, inputs, num_beams=3)
        assert torch.equal(beams, greedy(model, inputs, num_beams=3, use_cache=False))
        with pytest.raises(Unsupported, match="assisted"):
            greedy(model, dict(input_ids=ids(1, 3).repeat(1, 5)), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name):
    model, inputs = build("llama")
    converted = made(model, name)
    with attach(model, converted):
        wanted = run(model, inputs)
    model.to(torch.bfloat16)
    with attach(model, converted):
        result = run(model, inputs).float()
        greedy(model, inputs)
    assert (result - wanted).norm() / wanted.norm() <= 0.05


def test_caches_do_not_change_hands(tmp_path):
    model, inputs = build("llama")
    converted, filled, kept = (
        made(model, "hedgehog"),
        DynamicCache(config=model.config),
        DynamicCache(config=model.config),
    )
    run(model, inputs, past_key_values=filled)
    with pytest.raises(Unsupported, match="own attention filled"), attach(model, converted):
        run(model, inputs, past_key_values=filled)
    with attach(model, converted):
        run(model, inputs, past_key_values=kept)
        with pytest.raises(Unsupported, match="cannot be saved"):
            save_cache(kept, tmp_path / "cache")
    with pytest.raises(Unsupported, match="attach the mechanism again"):
        run(model, inputs, past_key_values=kept)
    with pytest.raises(Unsupported, match="goes on under the kind"), attach(model, "streaming_llm"):
        run(model, inputs, past_key_values=kept)
    with attach(model, converted):
        run(model, dict(input_ids=ids(1, 3)), past_key_values=kept)
    assert kept.get_seq_length() == 15


def test_nothing_is_left_behind_and_weights_come_back():
    model, inputs = build("llama")
    run(model, inputs)
    before, weights = state(model), {n: p.clone() for n, p in model.named_parameters()}
    changed = {
        "model.layers.1.self_attn.o_proj.weight": 2 * weights["model.layers.1.self_attn.o_proj.weight"]
    }
    with attach(model, dataclasses.replace(made(model, "lawcat"), weights=changed)):
        run(model, inputs)
        assert torch.equal(model.model.layers[1].self_attn.o_proj.weight, changed.popitem()[1])
    with (
        pytest.raises(ValueError, match="parameters of this model"),
        attach(model, Converted(catalog.method("softmax"), {}, {"no": weights.popitem()[1]})),
    ):
        pass
    assert state(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_gradients_reach_the_learned_parts():
    model, inputs = build("llama")
    converted = made(model, "lawcat")
    learned = [p.requires_grad_() for parts in converted.params.values() for p in parts.values()]
    with attach(model, converted):
        logits(model(**inputs, use_cache=False)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


# -- conversion


@pytest.mark.parametrize(("name", "finetune"), [("hedgehog", "lora"), ("lawcat", "full"), ("hedgehog", None)])
def test_conversion_learns_and_leaves_the_model_as_it_was(name, finetune):
    model, _ = build("llama")
    weights, before, text = {n: p.clone() for n, p in model.named_parameters()}, state(model), ids(12, 24)
    steps_seen = []
    converted = convert(
        model, mechanism=name, ids=text, steps=30, finetune=finetune, finetune_steps=10, batch=4, rate=3e-2,
        progress=lambda *step: steps_seen.append(step),
    )  # fmt: skip
    curve = converted.report["transfer_loss"]
    assert sum(curve[-5:]) < sum(curve[:5])
    assert len(steps_seen) == 30 + 10 * (finetune is not None)
    assert bool(converted.weights) == (finetune is not None)
    assert sorted(converted.params) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())
    assert state(model) == before
    again = convert(model, mechanism=name, ids=text, steps=3, finetune=None, batch=4, rate=3e-2)
    assert again.report["transfer_loss"] != curve[:3]  # the schedule ends earlier
    same = convert(model, mechanism=name, ids=text, steps=3, finetune=None, batch=4, rate=3e-2)
    assert again.report["transfer_loss"] == same.report["transfer_loss"]


def test_a_conversion_goes_on_from_its_transfer():
    model, _ = build("llama")
    options = dict(ids=ids(12, 24), steps=4, batch=4, finetune_steps=3)
    transferred = convert(model, finetune=None, **options)
    assert (
        convert(model, mechanism=transferred, **options).report["finetune_loss"]
        == convert(model, **options).report["finetune_loss"]
    )
    with pytest.raises(ValueError, match="before any fine-tuning"):
        convert(model, mechanism=convert(model, **options), **options)
    with pytest.raises(ValueError, match="those it was made with"):
        convert(model, mechanism=transferred, eps=1e-3, **options)


def test_settings_reach_a_name_a_spec_and_a_method():
    model, _ = build("llama")
    options = dict(ids=ids(12, 24), steps=1, batch=2, finetune=None, eps=1e-3)
    for mechanism in ("hedgehog", "hedgehog:eps=1e-2", catalog.method("hedgehog")):
        assert convert(model, mechanism=mechanism, **options).method.config.eps == 1e-3


def test_the_command_measures_before_and_after_and_writes_what_can_be_loaded(tmp_path):
    said = []
    report = convert_folder(
        "lm", "lawcat", tmp_path / "made", length=128, steps=2, finetune_steps=2, batch=2, lengths=(160,), samples=2,
        show=said.append,
    )  # fmt: skip
    assert [line[:16].strip() for line in said[:3]] == ["softmax", "after transfer", "after fine-tune"]
    assert report["rows"]["softmax"]["needle_160"] == 1
    assert report["rows"]["finetune"]["bytes_160"] == report["state_bytes"]
    assert report["rows"]["softmax"]["bytes_160"] > 160 * report["kv_bytes"]["160"] / 161
    model, tokenizer, converted = load_converted(tmp_path / "made", device="cpu")
    assert converted.report["rows"] == report["rows"]
    with attach(model, converted) as attached:
        greedy(model, dict(tokenizer("The function returns", return_tensors="pt")))
    assert attached.bytes_held() == report["state_bytes"]


def test_from_disk_it_is_the_same(tmp_path):
    model, inputs = build("llama")
    converted = convert(model, ids=ids(12, 24), steps=3, finetune="lora", finetune_steps=3, batch=4, width=5)
    with attach(model, converted):
        expected = run(model, inputs)
    converted.save(tmp_path / "made", model)
    assert not (tmp_path / "made.part").exists()
    other = type(model).from_pretrained(tmp_path / "made").eval()
    read = read_converted(tmp_path / "made")
    assert read.method == converted.method
    with attach(other, read):
        assert torch.equal(run(other, inputs), expected)
    converted.save(tmp_path / "parts")  # without the model: the weights that changed
    with attach(model, read_converted(tmp_path / "parts")):
        assert torch.equal(run(model, inputs), expected)
    with pytest.raises(ValueError, match=r"holds a config\.json; here is what a conversion learned"):
        load_converted(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"a conversion's folder holds a regard\.json"):
        load_converted(SHIPPED["lm"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"new or empty.*holds=\['file'\]"):
        converted.save(tmp_path / "other")


def test_transformers_alone_does_not_load_it_in_silence(tmp_path):
    """Its report names what it leaves out, in words that say what loads it; our own loading is silent."""
    model, inputs = build("llama")
    converted, said = made(model, "hedgehog"), []
    converted.save(tmp_path / "made", model)

    class Hear(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    log, hear = logging.getLogger("transformers"), Hear()
    log.addHandler(hear)
    try:
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
        assert "load_it_with_regard.load_converted" in " ".join(said)
        said.clear()
        with only_errors("transformers"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "made")
        assert not said
    finally:
        log.removeHandler(hear)
    assert torch.equal(run(other, inputs), run(model, inputs))
    assert "regard.load_converted(FOLDER)" in (tmp_path / "made" / "README.md").read_text()
    converted.save(tmp_path / "parts")
    assert "regard.read_converted(FOLDER)" in (tmp_path / "parts" / "README.md").read_text()


def listed(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_save_replaces_nothing_and_a_stopped_one_leaves_nothing(tmp_path, monkeypatch):
    model, _ = build("llama")
    converted = made(model, "hedgehog")
    converted.save(tmp_path / "made")
    (tmp_path / "made" / "note.txt").write_text("mine")
    kept = listed(tmp_path / "made")
    with pytest.raises(ValueError, match="holds='a conversion to hedgehog of a model'"):
        made(model, "lawcat").save(tmp_path / "made", model)
    assert listed(tmp_path / "made") == kept

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        converted.save(tmp_path / "other", model)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_the_folder_of_a_conversion_is_judged_before_any_work(tmp_path, monkeypatch):
    """Foreign files, another conversion: refused at once, and kept. The same conversion: its report, without work."""
    options = dict(length=128, steps=1, finetune=None, lengths=(128,), samples=1, show=lambda _: None)
    report = convert_folder("lm", "hedgehog", tmp_path / "made", **options)
    (tmp_path / "made" / "note.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    kept = [listed(tmp_path / at) for at in ("made", "mine")]

    def work(*_, **__):
        raise AssertionError("work before the folder was judged")

    monkeypatch.setattr(conversion, "load_any", work)
    assert convert_folder("lm", "hedgehog", tmp_path / "made", **options) == report
    with pytest.raises(
        ValueError, match=r"holds='a conversion to hedgehog of lm', mechanism=\('hedgehog', 'lawcat'\)"
    ):
        convert_folder("lm", "lawcat", tmp_path / "made", **options)
    with pytest.raises(ValueError, match=r"steps=\(1, 2\)"):
        convert_folder("lm", "hedgehog", tmp_path / "made", **{**options, "steps": 2})
    with pytest.raises(ValueError, match=r"new or empty.*note\.txt"):
        convert_folder("lm", "hedgehog", tmp_path / "mine", **options)
    with pytest.raises(ValueError, match="the output is a folder"):
        convert_folder("lm", "hedgehog", tmp_path / "file", **options)
    with pytest.raises(ValueError, match="can be written to"):
        convert_folder("lm", "hedgehog", tmp_path / "file" / "made", **options)
    with pytest.raises(ValueError, match="finetune is one of"):
        convert_folder("lm", "hedgehog", tmp_path / "new", **{**options, "finetune": "some"})
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1") * 500)
    with pytest.raises(ValueError, match=r"UTF-8: .*latin\.txt is not, at byte 0"):
        convert_folder("lm", "hedgehog", tmp_path / "new", text=tmp_path / "latin.txt", **options)
    assert [listed(tmp_path / at) for at in ("made", "mine")] == kept and not (tmp_path / "new").exists()


def test_what_cannot_be_converted_is_said():
    model, _ = build("llama")
    with pytest.raises(Unsupported, match="nothing to learn"):
        convert(model, mechanism="linear_attention", ids=ids(4, 8))
    with pytest.raises(Unsupported, match="takes mechanisms"):
        convert(model, mechanism="streaming_llm", ids=ids(4, 8))
    with pytest.raises(ValueError, match="finetune is one of"):
        convert(model, ids=ids(4, 8), finetune="some")
    sliding, _ = build("mistral")
    with pytest.raises(Unsupported, match=r"layers\.0\.self_attn"):
        convert(sliding, ids=ids(4, 24), steps=1)


@pytest.mark.parametrize("first", [None, 1])
def test_windows_of_a_text_are_as_long_as_is_asked_with_the_first_token_among_them(first):
    """Tokens that follow one another in the text, behind the tokenizer's first token where it has one."""
    model, _ = build("llama")
    letters = SimpleNamespace(bos_token_id=first, encode=lambda text, **options: [ord(c) - 60 for c in text])
    text = "".join(map(chr, range(62, 122)))
    draw = drawer(model, letters, text, None, None, length=7, batch=20, seed=0)
    windows, weights = draw(0)
    assert windows.shape == (20, 7) and weights is None
    text_of = windows if first is None else windows[:, 1:]
    assert (text_of.diff(dim=1) == 1).all() and len({*text_of[:, 0].tolist()}) > 10
    assert first is None or (windows[:, 0] == first).all()
    assert torch.equal(draw(0)[0], windows) and not torch.equal(draw(1)[0], windows)
    for many, taken in ((7 - (first is not None), False), (8 - (first is not None), True)):
        with (
            nullcontext()
            if taken
            else pytest.raises(ValueError, match="more tokens of text than a window holds")
        ):
            drawer(model, letters, text[:many], None, None, length=7, batch=2, seed=0)(0)


class Unscaled(teachers.Teacher):
    """Of a model that hands its attention no scale."""

    def loss(self, call, out):
        return super().loss(without(call, "scaling"), out)


@pytest.mark.parametrize(
    ("family", "teacher"), [("llama", teachers.Teacher), ("llama", Unscaled), ("gpt2", teachers.Teacher)]
)
def test_what_is_taught_are_the_models_own_weights(family, teacher, monkeypatch):
    model, inputs = build(family)
    wanted, softmax = [], teachers.masked_softmax

    def noted(*asked):
        wanted.append(softmax(*asked).detach())
        return wanted[-1]

    monkeypatch.setattr(teachers, "masked_softmax", noted)
    teaches = teacher(catalog.method("hedgehog"), "weights", seed=0)
    teaches.teaching = True
    with attach(model, teaches), torch.no_grad():
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(**inputs, output_attentions=True).attentions
    assert len(wanted) == len(own) == 3
    for taught, weights in zip(wanted, own, strict=True):
        torch.testing.assert_close(taught, weights, atol=1e-6, rtol=1e-5)
