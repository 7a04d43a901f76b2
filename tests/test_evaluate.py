"""evaluate: lm-eval's tasks through the cache. Neutral is lm-eval's own; what is evicted shows; nothing is cut off."""

import importlib
import importlib.util
import json
import logging
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import regard
from regard import catalog
from regard.attaching.attachment import attach
from regard.bench import evaluate as module
from regard.bench import harness, harness_tasks
from regard.bench.evaluate import asked_methods
from regard.bench.harness import Text, batches, language_model, scored, texts
from regard.bench.harness_tasks import Asking, load_tasks, quiet, unknown_task
from regard.core import Unsupported
from regard.models.shipped import load_shipped
from regard.report.scores import Evaluation, difference, difference_text, show, value_text
from regard.testing.zoo import HYBRIDS, build, ids

MISSING = [name for name in harness.NEEDS if importlib.util.find_spec(name) is None]
needs = lambda test: pytest.mark.harness(  # noqa: E731
    pytest.mark.skipif(bool(MISSING), reason="lm-eval is not installed: pip install 'regard[eval]'")(test)
)

SENTENCE = "The code of the harbour is 4821 and the ship leaves at noon from the old northern pier"
WORDS = SENTENCE.split()
# documents whose contexts and choices have unequal lengths
CHOICES = [
    {
        "text": " ".join(WORDS[i : i + n]),
        "choices": [WORDS[n], " ".join(WORDS[:3]), "a", "b"][: 2 + i % 3],
        "gold": i % 2,
    }
    for i, n in enumerate((2, 9, 5, 16, 3, 12))
]
TEXTS = [{"text": " ".join(WORDS * n)} for n in (1, 3, 2)]
TASKS = {
    "t_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "docs": CHOICES,
    },
    "t_empty": {
        "output_type": "multiple_choice", "doc_to_text": "", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}], "docs": CHOICES[:3],
    },
    "t_write": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
        "docs": CHOICES,
    },
    "t_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}], "docs": TEXTS,
    },
}  # fmt: skip
FORMS = ["t_choice", "t_empty", "t_write", "t_rolling"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks as lm-eval reads them: YAML (of which JSON is a part) over lines of JSON."""
    root = tmp_path_factory.mktemp("tasks")
    for name, given in TASKS.items():
        task = {key: value for key, value in given.items() if key != "docs"}
        (root / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in given["docs"]))
        where = {"data_files": {"test": str(root / f"{name}.jsonl")}, "cache_dir": str(root / "cache")}
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test"}
        (root / f"{name}.yaml").write_text(json.dumps(task | {"metadata": {"version": 2.5}}))
    group = {"group": "t_group", "task": ["t_choice", "t_empty"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (root / "t_group.yaml").write_text(json.dumps(group))
    return root


@pytest.fixture(scope="module")
def lm():
    return load_shipped("lm")


@pytest.fixture
def ask(folder, lm, tmp_path):
    return partial(module.evaluate, lm, out=tmp_path / "out", include_path=folder)


def responses(wrapped, folder, task) -> list:
    """What a model answers to each request of a task, in lm-eval's own run."""
    from lm_eval.evaluator import evaluate

    with quiet():
        loaded = load_tasks([task], folder, Asking())
        found = evaluate(wrapped, {"tasks": loaded.tasks}, bootstrap_iters=0)
    return [response[0] for sample in found["samples"][task] for response in sample["resps"]]


def plain(lm, batch_size=1):
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=lm[0], tokenizer=lm[1], batch_size=batch_size)


def wrapped(lm, batch_size=1):
    with quiet():
        return language_model(*lm, batch_size=batch_size)


def lm_eval_tasks():
    return importlib.import_module("lm_eval.tasks")


def close(ours: list, theirs: list, atol: float = 1e-4) -> bool:
    """Log-likelihoods to `atol`, whether they are greedy and generated texts exactly."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = list(zip(a, b, strict=True)) if isinstance(b, tuple) else [(a, b)]
        for x, y in pairs:
            same = abs(x - y) < atol if isinstance(y, float) else x == y
            if not same:
                return False
    return True


@needs
@pytest.mark.parametrize("task", FORMS)
def test_neutral_is_what_lm_eval_gives_for_each_sample(folder, lm, task):
    expected, ours = responses(plain(lm, 4), folder, task), wrapped(lm, 4)
    assert close(responses(ours, folder, task), expected)
    for name in ("streaming_llm", "snapkv", "h2o"):
        with attach(lm[0], name, budget=1.0):
            assert close(responses(ours, folder, task), expected), name
    ours.at_once = True
    assert close(responses(ours, folder, task), expected)


@needs
def test_one_forward_never_evicts_and_so_lm_eval_alone_would_not_see_the_policy(folder, lm):
    theirs, ours = plain(lm), wrapped(lm)
    expected = responses(theirs, folder, "t_choice")
    with attach(lm[0], "streaming_llm", sinks=0, window=1):
        assert close(responses(theirs, folder, "t_choice"), expected)
        seen = responses(ours, folder, "t_choice")
    assert not close(seen, expected, 1e-2)


@needs
@pytest.mark.parametrize("task", ["t_choice", "t_rolling", "t_write"])
def test_one_slot_changes_the_answers(folder, lm, task):
    with attach(lm[0], "streaming_llm", sinks=0, window=1):
        assert not close(responses(wrapped(lm), folder, task), responses_plain(folder, lm, task), 1e-2)


def responses_plain(folder, lm, task):
    """Without the attachment that is there: on a second model of the same weights."""
    return responses(plain(load_shipped("lm")), folder, task)


@pytest.fixture(scope="module")
def unequal(lm):
    """Rows of unequal lengths, of distinct tokens, and their scores without a method.

    Equal keys, as those of one word twice in the first layer, are told apart by rounding.
    """
    drawn, asked = torch.Generator().manual_seed(0), []
    for n, m in ((4, 2), (20, 3), (9, 1), (31, 4), (1, 6), (1, 2), (16, 2)):
        tokens = (3 + torch.randperm(2000, generator=drawn)[: n + m]).tolist()
        asked.append((("", ""), tokens[:n], tokens[n:]))
    return asked, wrapped(lm)._loglikelihood_tokens(asked)


@needs
@pytest.mark.parametrize("name", catalog.list_methods(kind="cache"))
def test_batches_of_unequal_rows_score_as_single_ones(lm, unequal, name):
    (asked, by_itself), found = unequal, []
    for size in (1, 4):
        settings = {"budget": 6} if catalog.takes_budget(name) else catalog.get(name).test_settings[0]
        with attach(lm[0], name, tokenizer=lm[1], **settings):
            found.append(wrapped(lm, size)._loglikelihood_tokens(asked))
    assert close(*found)
    assert not close(found[0], by_itself, 1e-2)


@needs
@pytest.mark.parametrize(("name", "settings"), [("window", {"window": 4}), ("block_topk", {"top_k": 1})])
def test_masks_and_sparse_prefills_score_alike_in_batches_and_act(folder, lm, name, settings):
    alone, together, ours = wrapped(lm, 1), wrapped(lm, 4), []
    for model in (alone, together):
        model.at_once = True
        with attach(lm[0], name, **settings):
            ours.append(responses(model, folder, "t_rolling"))
    assert close(*ours)
    if name == "window":
        assert not close(ours[0], responses(plain(lm), folder, "t_rolling"), 1e-2)
        alone.at_once = False  # token by token the same window shows the same
        with attach(lm[0], name, **settings):
            assert close(responses(alone, folder, "t_rolling"), ours[0])


def by_hand(model, context: list[int], continuation: list[int], keep: int) -> float:
    """The log-likelihood where after the prompt only the latest `keep` tokens are seen, from one masked forward."""
    tokens, start = torch.tensor([context + continuation[:-1]]), len(context) - 1
    n = tokens.shape[1]
    age = torch.arange(n)[:, None] - torch.arange(n)
    shown = (age >= 0) & ((age <= keep) | (torch.arange(n)[:, None] < start))
    bias = torch.zeros(1, 1, n, n).masked_fill(~shown, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logs = model(tokens, attention_mask=bias, use_cache=False).logits[0].log_softmax(-1)
    return float(logs[range(start, n), continuation].sum())


def test_a_prompt_is_seen_whole_and_evicted_after_it():
    """Rotation knows differences of positions only, so a window over what follows the prompt is the oracle."""
    model = build("llama")[0].eval()
    context, continuation = ids(1, 20)[0].tolist(), ids(1, 5)[0].tolist()
    with attach(model, "streaming_llm", sinks=0, window=4):
        ((_, ours, _),) = scored(model, texts([(None, context, continuation)]), 0, False)
    assert ours == pytest.approx(by_hand(model, context, continuation, 4), abs=1e-4)
    assert abs(ours - by_hand(model, context, continuation, 30)) > 1e-3


@pytest.mark.parametrize(
    "family", ["gpt2", "gemma3", *(name for name in HYBRIDS if name != "recurrentgemma")]
)
def test_rows_of_a_batch_are_as_if_alone(family):
    """Learned positions, windows, and recurrences, which would run over padding."""
    model = build(family)[0].eval()
    asked = [
        (None, ids(1, n)[0].tolist(), ids(1, m)[0].tolist()) for n, m in ((9, 2), (4, 5), (9, 1), (1, 3))
    ]
    found = {}
    for batch in batches(texts(asked), 4, harness.equal_lengths(model)):
        found |= {i: answer for i, *answer in scored(model, batch, 0, False)}
    for i, (_, context, continuation) in enumerate(asked):
        with torch.no_grad():
            logs = (
                model(torch.tensor([context + continuation[:-1]]))
                .logits[0, len(context) - 1 :]
                .log_softmax(-1)
            )
        total = float(logs[range(len(continuation)), continuation].sum())
        assert found[i][0] == pytest.approx(total, abs=1e-4)
        assert found[i][1] == (logs.argmax(-1).tolist() == continuation)


def test_texts_that_are_fed_alike_are_fed_once():
    made = texts([("a", [1, 2], [3, 4]), ("b", [1, 2], [3, 5]), ("c", [1], [2, 3, 4]), ("d", [9], [8])])
    assert [(t.prompt, t.fed, [i for i, _ in t.answers]) for t in made] == [
        ([1], [2, 3], [0, 1]), ([], [1, 2, 3], [2]), ([], [9], [3]),
    ]  # fmt: skip
    rows = [Text([0] * n, [0] * (1 + n % 2)) for n in (3, 0, 5, 3, 0)]
    assert [[len(t.prompt) for t in b] for b in batches(rows, 2)] == [[5, 3], [3], [0, 0]]
    assert [[len(t.prompt) for t in b] for b in batches(rows, 3, equal=True)] == [[5], [3, 3], [0, 0]]


@needs
def test_what_does_not_fit_is_refused_by_name(lm, folder, ask):
    ours = wrapped(lm)
    ours._max_length = 9
    told = r"nothing is cut off \(task='{}', document={}, tokens={}, limit=9"
    with pytest.raises(ValueError, match=told.format("t_choice", r"\d", r"\d+")):
        responses(ours, folder, "t_choice")
    with pytest.raises(ValueError, match=told.format("t_write", 0, r"\d+") + ", generated=12"):
        responses(ours, folder, "t_write")
    # lm-eval reads a long text in windows, each token once; so it does here
    theirs = plain(lm)
    theirs._max_length = 9
    assert close(responses(ours, folder, "t_rolling"), responses(theirs, folder, "t_rolling"))


@needs
def test_a_run_and_its_rows(ask, tmp_path, lm, monkeypatch):
    monkeypatch.setattr(harness.ThroughCache, "max_length", 2048, raising=False)
    seen = []
    found = ask(
        ["streaming_llm", "window:window=4"], ["t_choice", "t_rolling"], [1.0, 4], log_samples=True,
        batch_size=3, progress=lambda row, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert not found.failed()
    assert [(c["label"], c["budget"]) for c in found.cells[:4]] == [
        ("full", None), ("streaming_llm", 1.0), ("streaming_llm", 4), ("window(window=4)", None),
    ]  # fmt: skip
    full, whole, few, _ = [r for r in found.rows if r["metric"] == "word_perplexity"]
    assert full["value"] == pytest.approx(whole["value"], rel=1e-5)
    assert whole["difference"] == pytest.approx(0, abs=1e-2 * full["value"])
    assert few["value"] > 1.2 * full["value"]
    assert few["difference_low"] <= few["difference"] <= few["difference_high"]
    assert few["difference"] == pytest.approx(few["value"] - full["value"])
    assert "difference" not in full
    assert (full["version"], full["documents"], full["num_fewshot"]) == (2.5, 3, 0)
    packages = ("regard", "torch", "transformers", "lm_eval")
    assert all(found.run["versions"][package] for package in packages)
    assert len(found.cells[0]["revisions"]["model"]) == 12
    held = [c["bytes_kept"] for c in found.cells[4:7]]
    assert held[1] >= 0.9 * held[0] > 5 * held[2]
    assert seen[0] == (0, 4 * 6 + 4 * 3) and seen[-1] == (36, 36) and seen == sorted(seen)
    # lm-eval's own error, and the samples of each question
    acc = next(r for r in found.rows if r["metric"] == "acc")
    assert acc["stderr"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 5) ** 0.5)
    lines = (tmp_path / "out" / f"samples-{acc['cell']}.jsonl").read_text().splitlines()
    assert [json.loads(line)["acc"] for line in lines] == [value for _, value in acc["items"]]


@needs
def test_the_same_call_goes_on_and_asks_nothing_twice(ask, tmp_path, monkeypatch):
    first = ask(["streaming_llm"], ["t_choice"], [4])
    results = tmp_path / "out" / "results.jsonl"
    before = results.read_bytes()
    asked = []
    real = harness_tasks.ask
    monkeypatch.setattr(module.tasks_of, "ask", lambda name, *rest: asked.append(name) or real(name, *rest))
    again = ask(["streaming_llm"], ["t_choice"], [4])
    assert asked == [] and again.rows == first.rows and results.read_bytes() == before
    # killed before the last question had its own row: it alone is asked again
    results.write_bytes(before[: before[:-1].rfind(b"\n") + 1])
    again = ask(["streaming_llm"], ["t_choice"], [4])
    assert asked == ["t_choice"] and again.scores() == first.scores()
    # samples that are asked for later are not there yet
    assert ask(["streaming_llm"], ["t_choice"], [4], log_samples=True).scores() == first.scores()
    assert asked == ["t_choice"] * 3
    with pytest.raises(ValueError, match="the output folder is of the same run"):
        ask(["streaming_llm"], ["t_choice"], [5])


@needs
def test_other_documents_are_other_questions(ask, folder, tmp_path):
    keys = [cell["key"] for cell in ask([], ["t_choice"]).cells]
    data, old = folder / "t_choice.jsonl", (folder / "t_choice.jsonl").read_text()
    data.write_text(old.replace("harbour", "airport"))
    try:
        assert [cell["key"] for cell in ask([], ["t_choice"]).cells] != keys
    finally:
        data.write_text(old)


@needs
def test_examples_before_a_document_are_the_same_for_every_method(ask, tmp_path):
    found = ask(["streaming_llm"], ["t_choice"], [1.0], num_fewshot=2, limit=4, log_samples=True)
    full, ours = (
        [
            json.loads(line)
            for line in (tmp_path / "out" / f"samples-{c['key']}.jsonl").read_text().splitlines()
        ]
        for c in found.cells
    )
    assert [s["prompt_hash"] for s in full] == [s["prompt_hash"] for s in ours]
    assert len(full) == 4 and full[0]["arguments"][0][0].count("\n\n") == 2
    assert found.rows[0]["num_fewshot"] == 2


@needs
def test_groups_are_formed_of_their_tasks(ask):
    found = ask(["streaming_llm"], ["t_group"], [1.0])
    value = {(r["task"], r["method"]): r["value"] for r in found.rows if r["metric"] == "acc"}
    for method in ("full", "streaming_llm"):
        pooled = (6 * value["t_choice", method] + 3 * value["t_empty", method]) / 9
        assert value["t_group", method] == pytest.approx(pooled)
    assert [r["share"] for r in found.rows if r["task"] == "t_group"] == [True, True]


@needs
def test_what_fails_is_a_row(ask, folder, tmp_path, capsys):
    broken = json.loads((folder / "t_choice.yaml").read_text()) | {"task": "t_broken"}
    broken["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "nothing.jsonl")}}
    (tmp_path / "t_broken.yaml").write_text(json.dumps(broken))
    found = ask(["streaming_llm"], ["t_empty", str(tmp_path / "t_broken.yaml")], [4])
    assert [cell["status"] for cell in found.cells] == ["ok", "ok", "failed", "failed"]
    assert "nothing.jsonl" in found.failed()[0]["error"]
    show(found)
    said = capsys.readouterr().out
    assert "t_empty, acc ↑ in %: 3 documents" in said and "Failed" in said


@needs
def test_a_model_that_cannot_be_reached_is_a_row(folder, lm, tmp_path):
    model = BloomForCausalLM(BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4)).eval()
    found = module.evaluate((model, lm[1]), ["snapkv"], ["t_empty"], [4], out=tmp_path, include_path=folder)
    assert [cell["status"] for cell in found.cells] == ["ok", "unsupported"]
    assert "AttentionInterface" in found.failed()[0]["error"]


def test_a_model_that_keeps_its_cache_to_itself_is_refused():
    model = build("recurrentgemma")[0].eval()
    with pytest.raises(Unsupported, match="RecurrentGemmaForCausalLM gives no past_key_values"):
        scored(model, texts([(None, [5, 6, 7], [8])]), 0, False)


@needs
def test_wrong_names_are_told_with_the_near_ones(ask, folder, monkeypatch):
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        ask(["streming_llm"], ["t_choice"])
    with pytest.raises(ValueError, match="budgets are for cache pages"):
        ask(["window:window=4"], ["t_choice"], [0.5])
    with pytest.raises(ValueError, match="no target is met here"):
        asked_methods(["block_topk:target=mass:0.9"], None)
    with pytest.raises(ValueError, match="at least one task"):
        ask([], [])
    # reading lm-eval's own tasks takes some twenty seconds: here it has none
    own = lm_eval_tasks().TaskManager
    monkeypatch.setattr(lm_eval_tasks(), "TaskManager", lambda include_path, include_defaults: own(
        include_path=include_path, include_defaults=False))  # fmt: skip
    with pytest.raises(KeyError, match="no task of lm-eval is called 't_chioce'; near names: t_choice"):
        ask([], ["t_chioce"])
    assert "near names: arc_easy" in str(unknown_task("arc_eazy", ["arc_easy", "hellaswag"]))
    assert "lm-eval ls tasks" in str(unknown_task("zzz", ["arc_easy"]))
    with quiet():
        assert list(load_tasks(["t_*e"], folder, Asking()).tasks) == ["t_choice", "t_write"]


def test_missing_lm_eval_is_told_with_what_to_install(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    for call in (partial(language_model, *lm), partial(module.evaluate, lm, out=tmp_path, tasks=["a"])):
        with pytest.raises(ValueError, match=r"pip install 'regard\[eval\]'.*lm_eval"):
            call()


@needs
def test_nothing_is_left_behind(ask, lm):
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level, pad, drawn = logger.level, lm[1].pad_token_id, random.getstate()
    state, hooks = torch.get_rng_state(), dict(lm[0]._forward_hooks)
    ask(["streaming_llm"], ["t_choice"], [4])
    assert (logger.level, lm[1].pad_token_id, random.getstate(), task.tqdm) == (level, pad, drawn, bar)
    assert torch.equal(torch.get_rng_state(), state) and dict(lm[0]._forward_hooks) == hooks


def test_differences_are_drawn_in_pairs():
    full = {"task": "t", "metric": "acc", "value": 0.5, "items": [[i, i % 2] for i in range(100)]}
    same = {**full, "method": "a", "share": True}
    assert difference(same, full) == {"difference": 0, "difference_low": 0, "difference_high": 0}
    worse = {**same, "value": 0.4, "items": [[i, i % 2 if i >= 20 else 0] for i in range(100)]}
    apart = difference(worse, full)
    assert apart["difference"] == pytest.approx(-0.1)
    # ten of a hundred documents differ, by one: the standard error is 0.03
    assert apart["difference_low"] == pytest.approx(-0.16, abs=0.02)
    assert apart["difference_high"] == pytest.approx(-0.04, abs=0.02)
    assert difference_text({**worse, **apart}).startswith("-10.0 [-1")
    assert value_text({"value": 0.65, "stderr": 0.1094, "share": True}) == "65.0 ± 10.9"
    other = {**worse, "items": worse["items"][1:]}
    assert difference(other, full)["difference_low"] is None
    assert difference(worse, {**full, "value": None}) == {}
    perplexity = lambda items: sum(a for a, _ in items) / sum(b for _, b in items)  # noqa: E731
    rows = [{**full, "value": v, "items": [[i, [v * i, i]] for i in range(1, 9)]} for v in (3.0, 2.0)]
    found = difference(*rows, perplexity)
    assert [round(x, 9) for x in found.values()] == [1, 1, 1]


@needs
@pytest.mark.parametrize("method", ["streaming_llm", "streming_llm"])
def test_the_command(folder, tmp_path, method, regard_command):
    words = ["evaluate", "lm", "--tasks", "t_choice", "--methods", method, "--budgets", "4", "--include-path",
             str(folder), "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    if method == "streaming_llm":
        done = subprocess.run(
            [sys.executable, "-m", "regard.cli", *words], capture_output=True, text=True, check=False
        )
    else:
        done = regard_command(*words)
    if method == "streming_llm":
        assert done.returncode == 2 and not done.stderr
        assert "near names: streaming_llm" in json.loads(done.stdout)["error"]["message"]
        return
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {row["method"] for row in said["rows"]} == {"full", "streaming_llm"} and len(said["cells"]) == 2


def test_a_failure_ends_with_status_one(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from regard.cli import app

    cell = {
        "key": "k",
        "task": "t",
        "label": "h2o",
        "budget": 0.25,
        "status": "unsupported",
        "error": "why not",
    }
    for cells, status in (([cell], 1), ([{**cell, "status": "ok"}], 0)):
        monkeypatch.setattr(module, "evaluate", lambda *_, found=cells, **__: Evaluation({}, [], found))
        done = CliRunner().invoke(app, ["evaluate", "lm", "--tasks", "t", "--out", str(tmp_path)])
        assert done.exit_code == status
        assert ("why not" in done.output) == bool(status)


def test_it_is_a_name_of_the_package():
    assert regard.evaluate is module.evaluate
