"""compare: cells and their numbers, the folder that outlives a kill, and cells that go wrong."""

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from tests.kills import goes_on

import regard
from regard import catalog
from regard.bench import cell as cells
from regard.bench import executor
from regard.bench.asked import grid, parsed
from regard.bench.cell import FULL, Cell
from regard.bench.compare import compare
from regard.bench.executor import InProcess, LocalProcesses, WorkerBroken, safely
from regard.bench.measuring import Bench, measure
from regard.bench.passes import Pass, run
from regard.bench.quality import fidelity, quality
from regard.core import Unsupported
from regard.models.shipped import load, load_shipped
from regard.report.folder import Folder
from regard.report.pictures import PictureResult
from regard.report.result import Result
from regard.tasks import Sample, Turn
from regard.testing.zoo import build, ids

SMALL = ["--tasks", "needle", "--lengths", "96", "--budgets", "0.25", "--samples", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def bench():
    return Bench(*load_shipped("lm"))


def test_a_budget_that_covers_everything_is_full_attention(bench):
    row = measure(Cell("streaming_llm", "perplexity", 96, 1.0, samples=3), bench)
    assert row["status"] == "ok"
    assert row["quality"] == pytest.approx(1, abs=1e-4)
    assert row["agreement"] == 1
    assert abs(row["kl"]) < 1e-5
    config = bench.model.config
    token = (
        2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )  # keys, values, float32
    assert row["bytes_kept"] == 3 * (96 + 63) * token


def test_an_evicting_method_holds_and_reads_less(bench):
    row = measure(Cell("streaming_llm", "perplexity", 512, 0.1, samples=2), bench)
    assert row["bytes_held"] < 0.15 * row["bytes_full"]
    assert row["bytes_read"] < 0.15 * row["bytes_read_full"]
    assert row["kl"] > 1e-3
    assert row["peak_bytes"] > 0


def test_a_method_with_words_of_its_own(bench):
    """It asks the model in words, which the model's own tokenizer gives."""
    row = measure(Cell("kvzip", "perplexity", 256, 0.25, samples=2), bench)
    assert row["status"] == "ok"
    assert row["bytes_kept"] < 0.5 * row["bytes_full"]


def test_a_selecting_method_holds_all_and_reads_less(bench):
    row = measure(Cell("tokenselect", "perplexity", 512, 0.1, {"reuse": 1.0}, samples=2), bench)
    assert (
        row["bytes_kept"] == row["bytes_full"] <= row["bytes_held"] <= 1.2 * row["bytes_full"]
    )  # room to grow
    assert row["bytes_read"] < row["bytes_read_full"]


def test_the_baseline_of_a_sliding_model_is_its_windows():
    """One layer of gemma3 holds the text, two hold 5 tokens of it; a tenth of the text leaves those two as they are."""
    small = Bench(build("gemma3")[0], None)
    batch = [Sample(ids(1, 200)[0].tolist(), ids(1, 5)[0].tolist(), (0, 0))]
    full, ours = (small.run(batch, m) for m in (None, catalog.method("streaming_llm", budget=0.1)))
    one_token = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert full.held == full.kept == (204 + 5 + 5) * one_token
    assert full.read == pytest.approx(full.held, rel=0.02)  # the mean of the steps
    assert ours.kept == (21 + 5 + 5) * one_token


def split(prompt, answer, turns=(), **rest):
    return Sample(prompt, answer, (0, 0), turns=tuple(Turn(q, a) for q, a in turns), **rest)


@pytest.mark.parametrize("parts", [{}, {"context": 5}, {"context": 5, "written": 4}, {"written": 3}])
@pytest.mark.parametrize("method", [None, catalog.method("streaming_llm", budget=1.0)])
def test_a_pass_gives_the_logits_of_one_forward_however_it_is_split(parts, method):
    model = build("llama")[0]
    texts = ids(2, 40).tolist()
    batch = [split(t[:16], t[16:19], [(t[19:26], t[26:28]), (t[28:29], t[29:33])], **parts) for t in texts]
    with torch.no_grad():
        whole = model(torch.tensor(texts)).logits
    places = [15, 16, 17, 25, 26, 28, 29, 30, 31]
    found = run(model, batch, method)
    assert torch.allclose(found.logits, whole[:, places], atol=1e-5)
    assert len(found.steps) == 9 + parts.get("written", 0)


def test_what_a_method_evicts_before_the_question_is_gone_in_every_turn():
    model = build("llama")[0]
    text = ids(1, 40)[0].tolist()
    method = catalog.method("streaming_llm", budget=8)
    known = run(model, [split(text[:24], text[24:26], [(text[26:30], text[30:32])])], method)
    unknown = run(model, [split(text[:24], text[24:26], [(text[26:30], text[30:32])], context=12)], method)
    assert not torch.allclose(known.logits[:, 0], unknown.logits[:, 0], atol=1e-3)
    assert known.held == unknown.held


def test_what_is_wanted_is_generated_freely():
    model = build("llama")[0]
    prompt = ids(1, 20)
    made = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    sample = Sample(prompt[0].tolist(), [0] * 6, (0, 0), wanted=("x",))
    assert run(model, [sample], None).logits.argmax(-1)[0].tolist() == made


def test_a_sample_whose_parts_are_longer_than_its_prompt_is_refused():
    with pytest.raises(ValueError, match="context \\+ written <= tokens of the prompt - 1"):
        Sample([1, 2, 3], [4], (0, 0), context=2, written=1)
    with pytest.raises(ValueError, match="has no turns"):
        Sample([1, 2, 3], [4], (0, 0), wanted=("x",), turns=(Turn([1], [2]),))


def test_tasks_take_settings_and_groups_stand_for_their_pages():
    cells = grid(["h2o"], ["needle:digits=2", "needle"], [96], [0.5], 2, 0, None, None)
    assert {c.task for c in cells if c.what == "cell"} == {"needle:digits=2", "needle"}
    with pytest.raises(KeyError, match="near names: needle"):
        grid(["h2o"], ["needel:digits=2"], [96], [0.5], 2, 0, None, None)
    with pytest.raises(ValueError, match="1 <= digits <= 20"):
        grid(["h2o"], ["needle:digits=0"], [96], [0.5], 2, 0, None, None)


def test_full_is_its_own_baseline(bench):
    row = measure(Cell(FULL, "needle", 128, samples=2), bench)
    assert (row["kl"], row["agreement"]) == (0, 1) and row["nll"] > 0
    row = measure(Cell(FULL, "perplexity", 128, samples=1, what="timing"), bench)
    assert row["kind"] == "timing" and row["decode_ratio"] == row["prefill_ratio"] == 1


class Words:
    def decode(self, ids):
        return "".join(chr(97 + int(i)) for i in ids)


def made_pass(best: list[list[int]], sure: float = 5.0) -> Pass:
    logits = torch.nn.functional.one_hot(torch.tensor(best), 4).float() * sure
    return Pass(logits, 0.0, [0.0], 0, 0, 0.0)


def test_quality_by_hand():
    samples = [Sample([0], [1, 2], (0, 0), 0.0), Sample([0], [3, 3], (0, 0), 1.0)]
    full, ours = [made_pass([[1, 2], [3, 3]])], [made_pass([[1, 2], [3, 1]])]
    row = quality("exact", samples, ours, full, Words())
    assert row["quality"] == 0.5
    assert [s["score"] for s in row["samples"]] == [1.0, 0.0]
    assert [s["generated"] for s in row["samples"]] == ["bc", "db"]
    right = float(torch.tensor([5.0, 0, 0, 0]).log_softmax(0)[0])
    assert row["nll"] == pytest.approx(-(3 * right + (right - 5)) / 4, rel=1e-5)
    assert 0 <= row["quality_low"] <= 0.5 <= row["quality_high"] <= 1
    score = fidelity([Sample([0], [1, 1], (0, 0))] * 2, ours, full)
    assert score["agreement"] == 0.75
    assert score["kl"] > 0


def test_quality_of_turns_is_the_share_of_answers():
    samples = [Sample([0], [1, 2], (0, 0), turns=(Turn([0], [3]), Turn([0], [1])))] * 2
    full = [made_pass([[1, 2, 3, 1], [1, 2, 3, 1]])]
    ours = [made_pass([[1, 2, 3, 2], [1, 1, 2, 1]])]
    row = quality("exact", samples, ours, full, Words())
    assert [s["score"] for s in row["samples"]] == pytest.approx([2 / 3, 1 / 3])
    assert row["quality"] == 0.5
    assert row["by_turn"] == [0.5, 0.5, 0.5]
    assert row["samples"][0]["answer"] == "bc | d | b"


def test_recall_counts_what_was_wanted_and_fidelity_until_they_part():
    sample = Sample([0], [0] * 3, (0, 0), wanted=("bc", "DD"))
    full, ours = [made_pass([[1, 2, 3]])], [made_pass([[1, 1, 3]])]
    row = quality("recall", [sample], full, full, Words())
    assert (row["quality"], row["nll"]) == (0.5, None)
    assert quality("recall", [sample], ours, full, Words())["quality"] == 0.0
    # the third step follows another text and says nothing of fidelity
    assert fidelity([sample], ours, full)["agreement"] == 0.5


def test_likelihood_is_told_by_place():
    sample = Sample([0], [1, 2, 3, 0], (0, 0))
    full, ours = [made_pass([[1, 2, 3, 0]])], [made_pass([[1, 2, 0, 0]])]
    row = quality("nll", [sample], ours, full, Words())
    places, values = zip(*row["nll_by_place"], strict=True)
    assert places == (0, 1, 2, 3)
    assert values[2] == pytest.approx(values[1] + 5, abs=1e-3)
    assert row["quality"] == pytest.approx(math.exp(-5 / 4), rel=1e-5)


def test_old_names_work_for_one_release():
    names = (cells, "Run", Pass), (cells, "Bench", Bench), (executor, "Broken", WorkerBroken)
    for module, old, new in names:
        with pytest.warns(DeprecationWarning, match=new.__name__):
            assert getattr(module, old) is new


def test_names_and_settings_are_checked():
    assert parsed("streaming_llm:sinks=8,window=64") == ("streaming_llm", {"sinks": 8, "window": 64})
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        parsed("streming_llm")
    with pytest.raises(ValueError, match="no setting 'sink'"):
        parsed("streaming_llm:sink=8")
    with pytest.raises(Unsupported, match="here stand cache pages"):
        parsed("softmax")
    with pytest.raises(ValueError, match=r"fractional budget lies in \(0, 1\]"):
        grid(None, None, None, (0.0,), 2, 0, None, None)
    with pytest.raises(KeyError, match="near names: needle"):
        grid(None, ("needel",), None, None, 2, 0, None, None)


def test_a_model_path_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="the model path is there"):
        compare(str(tmp_path / "nothing"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="no model can be loaded"):
        load("no-such-model")
    with pytest.raises(ValueError, match="near names: smollm2"):
        compare("smolm2", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_default_grid():
    made = grid(None, None, None, None, 8, 0, None, None)
    pages = regard.list_methods(kind="cache")
    each = sum(3 if catalog.takes_budget(name) else 1 for name in pages)
    assert len(made) == (9 + 3) * (1 + each)  # three tasks at three lengths; each length is timed
    timed = [c for c in made if c.what == "timing"]
    assert len({(c.label, c.budget, c.length) for c in timed}) == len(timed) == 3 * (1 + each)
    assert not any(c.what == "timing" for c in grid(None, None, None, None, 8, 0, None, None, timing=False))
    assert len({c.key for c in made}) == len(made)


def test_keys_are_stable():
    assert Cell("h2o", "needle", 64, 0.1).key == Cell("h2o", "needle", 64, 0.1).key
    assert Cell("h2o", "needle", 64, 0.1).key != Cell("h2o", "needle", 64, 0.2).key
    # runs that lie on disk go on: what came later is no part of the name where it says nothing
    assert Cell("h2o", "needle", 64, 0.1).key == "h2o-needle-64-39f160c1acf1"
    assert (
        Cell("h2o", "needle", 64, 0.1, settings={"sinks": 2}, samples=4).key == "h2o-needle-64-41c811f8f7a6"
    )
    said = [{"at_floor": True}, {"system": "Be brief."}, {"revisions": {"h2o": "1"}}, {"what": "timing"}, {}]
    assert len({Cell("h2o", "needle", 64, 0.1, **more).key for more in said}) == len(said)


def header(**settings) -> dict:
    return {"kind": "run", "settings": settings}


def test_a_line_cut_short_by_a_kill_is_taken_away(tmp_path):
    folder = Folder(tmp_path / "run")
    assert folder.open(header(a=1)) == {}
    folder.add({"key": "one", "status": "ok"})
    with folder.results.open("a") as file:
        file.write('{"key": "two", "sta')
    assert set(folder.open(header(a=1))) == {"one"}
    folder.add({"key": "three", "status": "ok"})
    assert set(folder.rows()) == {"one", "three"}


def test_what_a_model_says_ends_no_line_of_the_folder(tmp_path):
    """Python ends lines at more signs than JSON escapes, such as U+0085 and U+2028; a model may generate them."""
    said = "one\x85two\u2028three\u2029four\x0b\x1c\r\nfive"
    folder = Folder(tmp_path / "run")
    folder.open(header(a=1))
    rows = [
        {"kind": "cell", "key": str(i), "status": "ok", "samples": [{"generated": said}]} for i in range(2)
    ]
    for row in rows:
        folder.add(row)
    assert list(goes_on(lambda: folder.open(header(a=1)), "a later start").values()) == rows
    assert Result.load(folder.path).rows == rows and not Result.load(folder.path).unreadable
    pictured = [row | {"kind": "pictures"} for row in rows]
    folder.results.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pictured), "utf-8"
    )
    (folder.path / "run.json").write_text(json.dumps({"cells": ["0", "1"]}))
    assert goes_on(lambda: PictureResult.load(folder.path), "its report").rows == pictured


def test_the_folder_of_another_run_is_refused(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.open(header(lengths=[64]))
    with pytest.raises(ValueError, match=r"same run.*lengths=\(\[64\], \[128\]\)"):
        folder.open(header(lengths=[128]))
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="new, empty"):
        Folder(tmp_path).open(header())


def test_a_start_that_was_killed_before_its_header_is_gone_on_from(tmp_path):
    """The header is written beside and moved: what a kill leaves between the two is ours."""
    (tmp_path / "run.json.part").write_text('{"kind": "ru')
    folder = Folder(tmp_path)
    assert folder.open(header(a=1)) == {}
    assert folder.open(header(a=1)) == {} and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "run")
    folder.open(header())
    folder.add({"key": "one", "status": "ok"})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"disk of .* is full; finished cells are kept"):
        folder.add({"key": "two", "status": "ok"})
    assert set(folder.rows()) == {"one"}


def test_what_goes_wrong_becomes_a_row(bench, monkeypatch):
    short = safely(Cell("h2o", "needle", 4, 0.1), bench)
    assert short["status"] == "failed" and "length >=" in short["error"]

    def starve(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(Bench, "run", starve)
    assert safely(Cell("h2o", "needle", 96, 0.1, seed=5), bench)["status"] == "memory"


def test_a_cell_that_takes_too_long_is_a_row_and_the_next_one_runs():
    todo = [Cell("h2o", "perplexity", 1024, 0.5, samples=400), Cell(FULL, "needle", 96, samples=1)]
    rows = list(LocalProcesses(workers=1, limit=3).run(todo, partial(load_shipped, "lm")))
    assert sorted(r["status"] for r in rows) == ["ok", "timeout"]
    assert "limit of 3 s" in next(r["error"] for r in rows if r["status"] == "timeout")


def test_a_killed_worker_is_a_row_and_the_next_one_runs():
    def kill_first():
        while not rows:  # the first cell has ended, the second, which takes long, begins
            time.sleep(0.05)
        time.sleep(1)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    todo = [Cell(FULL, "needle", 96, samples=1), Cell("h2o", "perplexity", 1024, 0.5, samples=400)]
    rows = []
    killer = threading.Thread(target=kill_first)
    killer.start()
    for row in LocalProcesses(workers=1, limit=60).run(todo, partial(load_shipped, "lm")):
        rows.append(row)
    killer.join()
    assert {"memory"} <= {r["status"] for r in rows}
    assert len(rows) == 2


def test_a_model_that_cannot_load_ends_the_run_with_its_error():
    with pytest.raises(WorkerBroken, match="no model can be loaded"):
        list(LocalProcesses(workers=1).run([Cell(FULL, "needle", 96)], partial(load, "no-such-model")))


def test_a_loaded_model_is_measured_here(bench, tmp_path):
    seen = []
    result = compare(
        (bench.model, bench.tokenizer), ["snapkv"], ["needle"], [96], [0.5], out=tmp_path / "run", samples=2,
        progress=lambda row, done, total: seen.append((done, total)), executor=InProcess(),
    )  # fmt: skip
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [r["status"] for r in result.rows] == ["ok", "ok"]
    full, ours = result.timings
    assert [row["decode_ms"] for row in result.rows] == [full["decode_ms"], ours["decode_ms"]]
    assert 0 < ours["scoring_ms"] < ours["prefill_ms"] and "scoring_ms" not in full
    assert "<script" in (tmp_path / "run" / "report.html").read_text()
    assert "full attention" in result.sentence()


def command(folder, *more) -> list[str]:
    return [sys.executable, "-m", "regard.cli", "compare", "--out", str(folder), *SMALL, *more]


def wait_for_rows(folder, process, count: int) -> None:
    file, stop = folder / "results.jsonl", time.monotonic() + 120
    while time.monotonic() < stop and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)


def hears_interrupts() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("measured_here")
def test_a_stopped_run_loses_nothing_that_ended_and_resumes(tmp_path, how, regard_command):
    folder = tmp_path / "run"
    run = command(folder, "--no-timing", "--methods", "streaming_llm,h2o,snapkv,tidaldecode,tokenselect")
    first = subprocess.Popen(
        run, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears_interrupts
    )
    wait_for_rows(folder, first, 2)
    first.send_signal(how)
    said = first.communicate(timeout=60)[1]
    if how == signal.SIGINT:
        assert first.returncode == 130
        assert "Finished cells are kept" in said
    # a row that the kill cut short is none
    before = (folder / "results.jsonl").read_text().split("\n")[:-1]
    assert 2 <= len(before) < 6
    again = regard_command(*run[3:], "--json")
    assert again.returncode == 0, again.stderr
    after = (folder / "results.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 6
    assert len(json.loads(again.stdout)["rows"]) == 6
    assert (folder / "report.html").exists()


def test_nothing_to_compare_is_said():
    with pytest.raises(ValueError, match="at least one task and one length"):
        grid(None, (), None, None, 2, 0, None, None)
