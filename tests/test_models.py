"""doctor, the shipped model, and compressed caches on disk."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.core import Unsupported
from regard.models.shipped import load
from regard.testing.zoo import UNREACHED, ZOO, build, ids

MISSES = {"gemma3mm": ("model.vision_tower.head.attention",)}


@pytest.mark.parametrize("family", [f for f in ZOO if f not in UNREACHED])
def test_doctor_reaches_every_site(family):
    model, inputs = build(family)
    found = regard.doctor(model, **inputs)
    assert found.drift == 0
    assert found.reached
    assert found.missed == MISSES.get(family, ())
    assert not found.refused


@pytest.mark.parametrize("family", UNREACHED)
def test_doctor_names_what_cannot_be_reached(family):
    model, inputs = build(family)
    found = regard.doctor(model, **inputs)
    assert not found.reached and not found.healthy
    assert len(found.missed) == 2
    assert "never calls the attention interface" in str(found)
    assert type(model).__name__ in str(found)


def test_doctor_makes_up_ids_and_asks_for_the_rest():
    assert regard.doctor(build("llama")[0]).healthy
    with pytest.raises(ValueError, match="takes pixel_values"):
        regard.doctor(build("vit")[0])


def test_doctor_on_the_command_line():
    run = CliRunner()
    found = json.loads(run.invoke(app, ["doctor", "llama", "--json"]).stdout)
    assert found["healthy"] and len(found["reached"]) == 3
    assert run.invoke(app, ["doctor", "falcon"]).exit_code == 1


SAVED = {
    "h2o": dict(budget=6),
    "streaming_llm": dict(sinks=2, window=6),
    "razor_attention": dict(budget=0.5, heads=((0, 0), (1, 1), (2, 1)), sinks=1),
    "recycled_attention": dict(k=4, stride=3),
    "tokenselect": dict(budget=8),
    "longheads": dict(chunk=4, chunks=4),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_cache_goes_on_as_if_it_had_stayed(name, tmp_path):
    model, _ = build("llama")
    tokens, method = ids(2, 24), regard.method(name, **SAVED[name])

    def steps(cache, start: int, stop: int):
        logits = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(start, stop)]
        return torch.cat(logits, 1)

    with torch.no_grad(), regard.attach(model, method):
        cache = model(tokens[:, :18], use_cache=True).past_key_values
        steps(cache, 18, 21)
        regard.save_cache(cache, tmp_path / "cache.safetensors")
        stayed = steps(cache, 21, 24)
    with torch.no_grad(), regard.attach(model, method):
        again = steps(regard.load_cache(tmp_path / "cache.safetensors"), 21, 24)
    torch.testing.assert_close(again, stayed, rtol=0, atol=1e-6)


def test_only_caches_of_an_attachment_are_saved(tmp_path):
    model, inputs = build("llama")
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="only caches of an attachment"):
        regard.save_cache(cache, tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="the cache file is there"):
        regard.load_cache(tmp_path / "nothing.safetensors")


def test_a_cache_file_of_another_kind_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="the file is a regard-cache-1"):
        regard.load_cache(tmp_path / "x.safetensors")


def test_the_shipped_model_loads_as_any_checkpoint():
    model, tokenizer = regard.load_shipped("lm")
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert regard.doctor(model).healthy
    with pytest.raises(KeyError, match="no shipped model is called 'lmm'; near names: lm"):
        regard.load_shipped("lmm")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"a model folder holds a config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="the model path is there"):
        load("/no/such/folder")


def test_the_readme_runs():
    """The ten lines of Python in README.md do what they say."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["attached"].receipts() == {"block z at layers=(2,), heads=(1,)": 1}
