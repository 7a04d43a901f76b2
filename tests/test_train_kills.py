"""A training run that is killed at any of its writes ends with the very weights and points of one that was not.

A kill is the end of a process that runs no handler: each is a child that ends itself at one write, which it leaves
half done, or before it moves or removes a file.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regard.train import Plan, run, train
from regard.train.run import LAST

SMALL = dict(steps=2, every=1, length=16, pairs=2, vocab=16, tested=8, batch=4, width=8, layers=1, conv=0)
PLAN = Plan(rates=(1e-2, 3e-2), **SMALL)


@dataclass
class Kill:
    """Ends this process at the n-th write, in the middle of what can be half done; None: counts them."""

    at: int | None
    seen: list[str] = field(default_factory=list)

    def __call__(self, what: str, half=None) -> None:
        self.seen.append(what)
        if len(self.seen) - 1 == self.at:
            if half is not None:
                half()
            os._exit(9)


def watched(kill: Kill, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a run does to its folder goes by the kill: what it writes, moves, makes and takes away."""

    def before(owner, name: str, half=None):
        whole = getattr(owner, name)

        def write(*args, **rest):
            kill(name, half and (lambda: half(whole, *args, **rest)))
            return whole(*args, **rest)

        monkeypatch.setattr(owner, name, write)

    def half_saved(whole, tensors, path, **rest):
        whole(tensors, path, **rest)
        os.truncate(path, os.path.getsize(path) // 2)

    before(run, "save_file", half_saved)
    before(Path, "write_text", lambda whole, path, text, **rest: whole(path, text[: len(text) // 2], **rest))
    # a row was written and is pushed to the disk; torn, its last bytes are not there
    before(os, "fsync", lambda whole, fd: os.ftruncate(fd, os.fstat(fd).st_size - 5))
    for owner, name in (
        (os, "replace"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (run.RegardForCausalLM, "save_pretrained"),
    ):
        before(owner, name)


def killed(folder: Path, kill: Kill) -> int:
    """The exit status of a child that trains in the folder until it is killed."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            try:
                watched(kill, patch)
                train(PLAN, folder)
                os._exit(0)
            finally:
                os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
    folder, kill = tmp_path_factory.mktemp("whole"), Kill(None)
    with pytest.MonkeyPatch.context() as patch:
        watched(kill, patch)
        train(PLAN, folder)
    return folder, kill.seen


def test_the_writes_of_a_run_are_these(whole):
    _, seen = whole
    assert seen.count("save_file") == seen.count("fsync") == len(PLAN.rates) * PLAN.steps
    assert seen[:2] == ["write_text", "replace"] and seen.count("save_pretrained") == 2 and "unlink" in seen


def test_a_run_killed_at_any_write_ends_as_if_it_had_not_been(whole, tmp_path):
    folder, seen = whole
    weights = load_file(folder / "best" / "model.safetensors")
    for at, what in enumerate(seen):
        again = tmp_path / f"{at}"
        assert killed(again, Kill(at)) == 9
        train(PLAN, again)
        train(PLAN, again)  # once more it has nothing to do
        assert left(again) == left(folder), f"killed at write {at}, {what}"
        for name, tensor in load_file(again / "best" / "model.safetensors").items():
            assert torch.equal(tensor, weights[name]), f"killed at write {at}, {what}: {name}"


def test_the_folder_of_a_run_holds_no_parts(whole):
    folder, _ = whole
    assert not (folder / LAST).exists() and not list(folder.rglob("*.part"))
