"""Training runs: they learn, go on where they were stopped, and say what they came to."""

import json

import pytest
import torch
from typer.testing import CliRunner

from regard.cli import app
from regard.nn import RegardForCausalLM
from regard.train import Plan, train
from regard.train.run import LAST
from regard.train.tasks import TASKS

SMALL = dict(steps=40, rates=(1e-2, 3e-3), every=20, length=32, pairs=4, vocab=32, tested=64, width=16)


class Stop(Exception):
    pass


def stopping(at):
    points = []

    def hear(point):
        points.append(point)
        if len(points) == at:
            raise Stop

    return hear


def points(folder):
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [(r["key"], r["loss"], r["score"]) for r in rows]


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path):
    plan = Plan(**SMALL)
    whole = train(plan, tmp_path / "whole")
    for at in (25, 5, 17, 30):
        with pytest.raises(Stop):
            train(plan, tmp_path / "cut", stopping(at))
    assert train(plan, tmp_path / "cut")["scores"] == whole["scores"]
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    models = [RegardForCausalLM.from_pretrained(tmp_path / f / "best").state_dict() for f in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not (tmp_path / "whole" / LAST).exists()


def test_a_kill_between_checkpoint_and_row_loses_neither(tmp_path):
    plan = Plan(**SMALL)
    with pytest.raises(Stop):
        train(plan, tmp_path, stopping(25))
    kept = (tmp_path / "results.jsonl").read_text()
    # the checkpoint of step 20 is there, its row is not
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(Stop):
        train(plan, tmp_path, stopping(1))
    assert (tmp_path / "results.jsonl").read_text() == kept


def test_it_learns_and_the_best_rate_is_kept(tmp_path):
    result = train(Plan(**{**SMALL, "steps": 150, "rates": (1e-5, 1e-2), "width": 32}), tmp_path)
    assert result["rate"] == 1e-2 and result["score"] > 0.5
    assert (tmp_path / "report.html").read_text().count("Training loss") >= 1
    inputs, labels = TASKS["mqar"].test(Plan(**SMALL))
    model = RegardForCausalLM.from_pretrained(tmp_path / "best").eval()
    right = (model(inputs).logits.argmax(-1) == labels)[labels >= 0].float().mean().item()
    assert right == pytest.approx(result["score"], abs=1e-6)


def test_text_is_measured_in_bits_per_byte(tmp_path):
    plan = Plan(task="text", steps=20, rates=(1e-2,), every=20, length=32, tested=8, width=16)
    result = train(plan, tmp_path)
    assert 2 < result["score"] < 8
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["text_sha256"]


def test_the_old_name_of_the_settings_works_for_one_release():
    plan = Plan(**SMALL)
    with pytest.warns(DeprecationWarning, match="to_dict"):
        assert plan.told() == plan.to_dict()


def test_the_command(tmp_path):
    command = ["train", "--mechanism", "softmax,linear_attention", "--out", str(tmp_path / "run"), "--json"]
    sizes = dict(steps=20, length=32, pairs=4, vocab=32, width=16, every=10, rates=1e-2)
    small = [f"--{key}={value}" for key, value in sizes.items()]
    run = CliRunner().invoke(app, [*command, *small])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["mechanism"] == "softmax + linear_attention" and 0 <= result["score"] <= 1
    again = CliRunner().invoke(app, [*command, *small, "--steps=30"])
    assert "the same run" in str(again.exception) and "steps" in str(again.exception)
    assert "near names: softmax" in str(CliRunner().invoke(app, ["train", "--mechanism", "sofmax"]).exception)
