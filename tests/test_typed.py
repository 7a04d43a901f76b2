"""What was typed wrong for train, convert, calibrate and doctor: refused at once; nothing is made, nothing lost."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.cli.doctor import family_names
from regard.core.device import device_of
from regard.models.names import MARKER, check_model
from regard.models.shipped import SHIPPED
from regard.testing.zoo import ZOO
from regard.train import Plan
from regard.train.suits import SUITS
from regard.train.tasks import TASKS

WRONG = {
    "convert lm --finetune lorra": "near names: lora",
    "convert lm --mechanism hedghog": "near names: hedgehog",
    "convert lm --mechanism linear_attention": "nothing to learn",
    "convert lm --mechanism hedgehog:widht=3": "near names: width",
    "convert lm --lengths abc": "--lengths are whole numbers with commas between (lengths='abc', wrong='abc')",
    "convert lm --lengths 64,0": "lengths >= 1 (lengths=0)",
    "convert lm --lengths ,": "wrong=''",
    "convert lm --steps -1": "steps >= 0 (steps=-1)",
    "convert lm --samples 0": "samples >= 1",
    "convert lm --every 0": "every >= 1",
    "convert lm --device cudaa": "the device is cpu, cuda, cuda:N or mps (device='cudaa')",
    "convert lm --device cuda:99": "a GPU of this number is there",
    "convert lmm": "near names: lm",
    "convert shipped:lmm": "near names: lm",
    "calibrate lm xattenton --target mass:0.9": "near names: xattention",
    "calibrate lm xattention --target mas:0.9": "near names: mass",
    "train --task mqqar": "near names: mqar",
    "train --mechanism sofmax": "near names: softmax",
    "train --mechanism gla:nope=3": "no setting 'nope'",
    "train --mechanism gla:chunk=8,gla:chunk=16": "the same settings in all layers",
    "train --width 63 --heads 2": "heads divide the width (width=63, heads=2)",
    "train --layers 0": "layers >= 1",
    "train --steps 0": "steps >= 1",
    "train --mlp -1": "mlp >= 0",
    "train --rates abc": "--rates are numbers with commas between (rates='abc', wrong='abc')",
    "train --rates 0.1,0.1": "every learning rate once",
    "train --pairs 100": "pairs",
    "train --task digits --mechanism softmax,softmax,softmax --layers 4": "every stage has as many layers",
    "train --device cuda:99": "a GPU of this number is there",
    "train --mechanism halonet": "causal_self",
    "train --text FILE": "a text of one's own is for the task text",
}


def invoke(words: str, out) -> Exception:
    run = CliRunner().invoke(app, [*words.split(), "--out", str(out)])
    assert isinstance(run.exception, ValueError | KeyError | TypeError), (run.exit_code, run.output)
    return run.exception


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_refused_and_nothing_is_made(words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert WRONG[words] in str(invoke(words, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["convert lm", "calibrate lm xattention --target mass:0.9", "train"])
def test_a_folder_that_cannot_be_written_to_is_refused_and_kept(words, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    assert "the output is a folder" in str(invoke(words, tmp_path / "file"))
    assert "can be written to" in str(invoke(words, tmp_path / "file" / "under"))
    assert "holds=['note.txt']" in str(invoke(words, tmp_path / "mine"))
    assert (tmp_path / "mine" / "note.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "note.txt"]


def test_a_wrong_word_imports_no_transformers():
    code = """
import sys
from regard.cli import main
sys.argv = ["regard", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, "transformers" in sys.modules)
"""
    for words in ("convert lm --mechanism hedghog", "train --width 63 --heads 2", "doctor llma"):
        run = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
        assert run.stdout.split() == ["2", "False"], (words, run.stderr)


# models


def test_a_folder_without_weights_or_tokenizer_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for words in ("convert", "doctor"):
        run = CliRunner().invoke(app, [words, str(tmp_path)])
        assert "a model folder holds weights: *.safetensors" in str(run.exception)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"holds a tokenizer.*holds=\['config.json', 'model.safetensors'\]"):
        check_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "regard.safetensors")
    with pytest.raises(ValueError, match="holds weights"):
        check_model(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / MARKER).write_text("{}")
    with pytest.raises(ValueError, match=r"here is what a conversion learned, for .*read_converted"):
        check_model(tmp_path)


def test_doctor_takes_what_loads_a_model():
    assert regard.doctor("lm").healthy and regard.doctor(SHIPPED["lm"]).reached
    with pytest.raises(ValueError, match=r"a model of transformers, or its folder or name \(model='int'\)"):
        regard.doctor(3)
    with pytest.raises(ValueError, match="near names: lm"):
        regard.doctor("lmm")


def test_families_are_known_before_they_are_built():
    assert sorted(family_names()) == sorted(ZOO)
    run = CliRunner().invoke(app, ["doctor", "llma"])
    assert "near names: llama" in str(run.exception)


# devices and plans


def test_a_device_is_there_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name) for name in ("cuda", "cuda:1", "cpu", None)] == ["cuda", "cuda:1", "cpu", None]
    with pytest.raises(ValueError, match=r"device='cuda:2', gpus=2"):
        device_of("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("mps", "cuda:", "cuda:x", "gpu", "CUDA", ""):
        with pytest.raises(ValueError, match="must hold"):
            device_of(name)


def test_a_run_computes_where_it_is_told(tmp_path, monkeypatch):
    """Model, batches and the held-out data are on the device that was named: here one without numbers."""
    monkeypatch.setattr("regard.train.run.device_of", lambda name: name)
    small = dict(
        steps=1, every=1, rates=(1e-2,), length=16, pairs=2, vocab=16, tested=4, batch=4, width=8, layers=1
    )
    with pytest.raises(RuntimeError, match=r"item.. cannot be called on meta tensors"):
        regard.train.train(Plan(**small), tmp_path, device="meta")


def test_settings_of_what_is_in_no_layer_are_refused():
    with pytest.raises(KeyError, match=r"no mechanism of this run is called 'gla'; known: softmax"):
        Plan(settings={"gla": {"chunk": 8}})
    assert sorted(SUITS) == sorted(TASKS)
