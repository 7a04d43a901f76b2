"""A conversion that is stopped or killed ends with the very weights, losses and measurements of one that was not."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.kills import Kill, goes_on, killed, writes

from regard.attaching import converted as on_disk
from regard.bench import conversion
from regard.bench.conversion import convert_folder
from regard.bench.conversion_kept import STATE
from regard.core import Unsupported
from regard.models.shipped import load_shipped
from regard.tasks import Source
from regard.testing.zoo import build, ids
from regard.train import checkpoints
from regard.train.convert import convert, help_pages

SMALL = dict(
    length=128, steps=2, finetune="lora", finetune_steps=2, batch=2, lengths=(160,), samples=1, every=1,
    show=lambda _: None,
)  # fmt: skip


class Stop(Exception):
    pass


def stopping(stage: str, at: int):
    def hear(now, step, *_):
        if (now, step) == (stage, at):
            raise Stop

    return hear


def half_saved(whole, tensors, path, **rest):
    whole(tensors, path, **rest)
    os.truncate(path, os.path.getsize(path) // 2)


OWN = ((checkpoints, "save_file", half_saved), (on_disk, "save_file", half_saved))


@pytest.fixture(scope="module")
def quick():
    """One model for all conversions, few texts, and measurements that take no time and tell weights apart."""
    loaded = load_shipped("lm")

    def measured(bench, method, *_):
        parts = [] if method is None else [*method.weights.values(), *on_disk_parts(method)]
        numbers = sum(float(p.double().sum()) for p in parts)
        return {f"{name}_160": numbers for name in conversion.TASKS} | {"bytes_160": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "load_any", lambda *_, **__: loaded)
        patch.setattr(conversion, "SEQUENCES", 32)
        made = conversion.sequences(
            loaded[1], 128 + conversion.CONTINUATION, 32, 0, Source("help pages", "\n\n".join(help_pages()))
        )
        patch.setattr(conversion, "sequences", lambda *_: made)
        patch.setattr(conversion, "measured", measured)
        yield


def on_disk_parts(converted):
    return [p for parts in converted.params.values() for p in parts.values()]


def work(folder: Path, **options):
    return convert_folder("lm", "hedgehog", folder, **{**SMALL, **options})


def left(folder: Path) -> dict:
    """What a conversion leaves, without its times."""
    facts = json.loads((folder / "regard.json").read_text())
    for key in [key for key in facts["report"] if key.endswith("seconds")]:
        facts["report"].pop(key)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    return {"facts": facts, "files": files}


def tensors(folder: Path) -> dict:
    return load_file(folder / "regard.safetensors") | load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """(folder of a conversion that was not killed, the writes it took)"""
    folder = tmp_path_factory.mktemp("whole") / "made"
    return folder, writes(lambda: work(folder), *OWN)


def test_the_writes_of_a_conversion_are_these(whole):
    folder, seen = whole
    assert seen.count("save_file") == 4 + 1  # checkpoints, the end
    assert seen.count("fsync") == 4 and not (folder / STATE).exists()


def test_a_conversion_killed_at_any_write_ends_as_if_it_had_not_been(whole, tmp_path):
    folder, seen = whole
    wanted = tensors(folder)
    # of writes that are alike and follow each other, the first and the last
    ends = [
        at for at in range(len(seen)) if not seen[at - 1 : at] == seen[at : at + 1] == seen[at + 1 : at + 2]
    ]
    for at in ends:
        what = seen[at]
        again, where = tmp_path / f"{at}", f"killed at write {at}, {what}"
        assert killed(Kill(at), lambda out=again: work(out), *OWN) == 9
        goes_on(lambda out=again: work(out), where)
        goes_on(lambda out=again: work(out), where)  # once more it has nothing to do
        assert left(again) == left(folder), where
        assert all(torch.equal(t, wanted[name]) for name, t in tensors(again).items()), where


def test_finished_stages_and_steps_are_not_done_again(whole, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        work(tmp_path / "cut", progress=stopping("finetune", 2))
    (tmp_path / "cut" / "note.txt").write_text("mine")
    steps, measure = [], conversion.measured

    def once(bench, method, *rest):
        assert method is not None and method.weights, "softmax and the transfer were measured before"
        return measure(bench, method, *rest)

    monkeypatch.setattr(conversion, "measured", once)
    work(tmp_path / "cut", progress=lambda stage, step, *_: steps.append((stage, step)))
    assert steps == []  # the checkpoints of the last steps were there
    assert (tmp_path / "cut" / "note.txt").read_text() == "mine"
    wanted = tensors(whole[0])
    assert all(torch.equal(t, wanted[name]) for name, t in tensors(tmp_path / "cut").items())


def test_another_conversion_does_not_go_on_from_it(quick, tmp_path):
    with pytest.raises(Stop):
        work(tmp_path / "cut", progress=stopping("transfer", 1))
    kept = sorted(p.name for p in (tmp_path / "cut" / STATE).iterdir())
    for apart in (dict(steps=3), dict(seed=1), dict(samples=2)):
        with pytest.raises(ValueError, match="same run"):
            work(tmp_path / "cut", **apart)
    with pytest.raises(ValueError, match="length >= the tokens"):
        work(tmp_path / "short", lengths=(12,))
    assert sorted(p.name for p in (tmp_path / "cut" / STATE).iterdir()) == kept
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    ("name", "finetune"),
    [("hedgehog", "lora"), ("lawcat", "full"), ("seer_attention", None), ("flux_attention", None)],
)
def test_every_way_of_learning_goes_on_exactly(name, finetune, tmp_path):
    """Stopped twice within each stage, at a step behind the last checkpoint: nothing differs, drawn noise included."""
    model, _ = build("llama")
    options = dict(mechanism=name, ids=ids(12, 70), steps=7, batch=2, finetune=finetune, finetune_steps=5)
    expected = convert(model, **options)
    stages = [("transfer", 3), ("transfer", 6), *([("finetune", 3), ("finetune", 4)] if finetune else [])]
    for stage, at in stages:
        with pytest.raises(Stop):
            convert(model, **options, checkpoints=tmp_path, every=2, progress=stopping(stage, at))
    seen = []
    found = convert(
        model, **options, checkpoints=tmp_path, every=2, progress=lambda *step: seen.append(step[:2])
    )
    assert seen == ([("finetune", 5)] if finetune else [("transfer", 7)])  # behind the last that was kept
    again = convert(model, **options, checkpoints=tmp_path, progress=stopping("transfer", 1))  # all is done
    for kind in ("transfer_loss", "finetune_loss", "sparse_layers"):
        assert again.report.get(kind) == found.report.get(kind) == expected.report.get(kind)
    for at, parts in expected.params.items():
        assert all(torch.equal(p, found.params[at][n]) for n, p in parts.items())
    assert all(torch.equal(w, found.weights[n]) for n, w in expected.weights.items())
    with pytest.raises(ValueError, match="the same work"):
        convert(model, **{**options, "seed": 1}, checkpoints=tmp_path)


def test_nothing_is_kept_of_what_is_refused(tmp_path):
    model, _ = build("llama")
    with pytest.raises(Unsupported, match="nothing to learn"):
        convert(model, mechanism="linear_attention", ids=ids(4, 8), checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())
