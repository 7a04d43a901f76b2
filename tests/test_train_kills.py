"""A training run that is killed at any of its writes ends with the very weights and points of one that was not.

Each kill is a child that ends itself at one write, which it leaves half done, or before it moves or removes a file.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.kills import Kill, goes_on, killed, writes
from transformers import modeling_utils

from regard.nn import RegardForCausalLM
from regard.train import Plan, checkpoints, train
from regard.train.run import LAST

SMALL = dict(steps=2, every=1, length=16, pairs=2, vocab=16, tested=8, batch=4, width=8, layers=1, conv=0)
PLAN = Plan(rates=(1e-2, 3e-2), **SMALL)


def half_saved(whole, tensors, path, **rest):
    whole(tensors, path, **rest)
    os.truncate(path, os.path.getsize(path) // 2)


OWN = (
    (checkpoints, "save_file", half_saved),
    (RegardForCausalLM, "save_pretrained", None),
    (modeling_utils, "safe_save_file", half_saved),  # of the model that is kept
)


def left(folder: Path) -> dict:
    """What a run leaves, without its times."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    result["facts"].pop("tokens per second")
    return {
        "points": [(r["key"], r["rate"], r["step"], r["loss"], r["score"]) for r in rows],
        "result": {k: v for k, v in result.items() if k != "model"},
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a run that was not killed, the writes it took)"""
    folder = tmp_path_factory.mktemp("whole")
    return folder, writes(lambda: goes_on(lambda: train(PLAN, folder), "a run that nobody kills"), *OWN)


def test_the_writes_of_a_run_are_these(whole):
    _, seen = whole
    assert seen.count("save_file") == seen.count("fsync") == len(PLAN.rates) * PLAN.steps
    assert seen[:2] == ["write_text", "replace"] and seen.count("save_pretrained") == 2 and "unlink" in seen


def test_a_run_killed_at_any_write_ends_as_if_it_had_not_been(whole, tmp_path):
    folder, seen = whole
    weights = load_file(folder / "best" / "model.safetensors")
    for at, what in enumerate(seen):
        again = tmp_path / f"{at}"
        assert killed(Kill(at), lambda out=again: train(PLAN, out), *OWN) == 9
        where, kept = f"killed at write {at}, {what}", again / "best" / "model.safetensors"
        assert not kept.exists() or goes_on(lambda file=kept: load_file(file), f"{where}, what was kept")
        goes_on(lambda out=again: train(PLAN, out), where)
        goes_on(lambda out=again: train(PLAN, out), where)  # once more it has nothing to do
        assert left(again) == left(folder), where
        for name, tensor in load_file(again / "best" / "model.safetensors").items():
            assert torch.equal(tensor, weights[name]), f"{where}: {name}"


def test_the_folder_of_a_run_holds_no_parts(whole):
    folder, _ = whole
    assert not (folder / LAST).exists() and not list(folder.rglob("*.part"))
