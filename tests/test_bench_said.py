"""What bench refuses before it works, and what it says of what happened: one small case for each."""

from types import SimpleNamespace

import pytest

from regard import catalog
from regard.bench.compare import loader
from regard.bench.conversion import POSITIONS, sequences
from regard.bench.evaluate import asked_methods
from regard.bench.executors import local
from regard.bench.harness_tasks import set_fewshot
from regard.bench.timed import paired_times
from regard.models.shipped import load_shipped
from regard.report.scores import Evaluation, title_of
from regard.tasks.corpus import held_out
from regard.train.routes import SPARSE


def test_a_folder_without_a_model_is_refused_and_a_name_of_the_hub_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"holds a config\.json, or is a GGUF file"):
        loader(str(tmp_path), False)
    with pytest.raises(ValueError, match=r"holds a config\.json"):
        loader("./no/such/folder", False)
    assert loader("some-org/some-model", False)[0] == "some-org/some-model"
    (tmp_path / "config.json").write_text("{}")
    assert loader(str(tmp_path), False)[0] == str(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    assert loader(str(gguf), False)[0] == str(gguf)


def test_budgets_are_for_cache_pages_whatever_else_is_asked():
    chosen, budgets = asked_methods(["full", "snapkv"], [64])
    assert [name for name, _ in chosen] == ["full", "snapkv"] and [b.tokens for b in budgets] == [64]
    for methods in (["full"], ["window"], None):
        with pytest.raises(ValueError, match="budgets are for cache pages"):
            asked_methods(methods, [64])
    assert asked_methods(["window"], None)[0] == [("window", {})]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [(-9, "memory", "killed (signal 9)"), (1, "failed", "exit code 1"), (-11, "failed", "exit code -11")],
)
def test_what_ended_a_worker_is_told_by_its_exit_code(code, status, said):
    worker = object.__new__(local.Worker)
    cell = SimpleNamespace(row=lambda **facts: facts)
    process = SimpleNamespace(join=lambda timeout: None, exitcode=code)
    worker.process, worker.cell, worker.ready, worker.stop = process, cell, True, lambda: None
    row = worker._lost("failed", "the worker ended")
    assert row["status"] == status and said in row["error"]
    worker.cell, worker.ready = cell, True
    assert worker._lost("timeout", "too long") == {"status": "timeout", "error": "too long"}


@pytest.mark.parametrize(
    ("own", "wanted", "found"),
    [(None, None, 0), (None, 3, 3), (5, None, 5), (0, 3, 0), (2, 3, 3), (0, None, 0)],
)
def test_examples_before_a_question_are_those_that_lm_eval_would_give(own, wanted, found):
    config = {"num_fewshot": own}
    task = SimpleNamespace(
        get_config=config.get, set_config=lambda key, value: config.__setitem__(key, value)
    )
    set_fewshot(task, wanted)
    assert config["num_fewshot"] == found


def test_a_title_says_the_examples_that_are_known():
    row = {
        "task": "capitals",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "share": True,
        "documents": 20,
    }
    assert title_of({**row, "num_fewshot": 0}) == "capitals, acc ↑ in %: 20 documents, 0-shot"
    assert title_of(row) == "capitals, acc ↑ in %: 20 documents"
    assert (
        title_of({**row, "filter": "strict", "higher_is_better": False})
        == "capitals, acc ↓ strict in %: 20 documents"
    )


def test_a_conversion_learns_from_half_running_text_and_half_questions():
    rows = 8 * POSITIONS
    tokenizer = load_shipped("lm")[1]
    ids, weights, routes = sequences(tokenizer, 256, rows, 0, held_out())
    assert ids.shape == weights.shape == (rows, 256)
    text = routes.sparse == 1
    assert text.sum() == rows // 2 and (routes.sparse[~text] == SPARSE).all()
    assert (weights[text] == 1).all() and (weights[~text].amax(1) > weights[~text].amin(1)).all()
    assert len({*routes.prompts[~text].tolist()}) >= POSITIONS


def test_the_parts_of_a_first_token_are_told_of_methods_that_leave_keys_unread():
    run = SimpleNamespace(steps=[0.01, 0.03], prefill=0.5, parts={"estimate": 0.1, "attention": 0.15})
    bench = SimpleNamespace(run=lambda samples, method: run)
    facts = paired_times([], catalog.method("window", window=4), bench)
    assert [facts[f"{name}_ms"] for name in ("estimate", "attention", "rest")] == pytest.approx(
        [100, 150, 250]
    )
    for method in (None, catalog.method("snapkv")):
        facts = paired_times([], method, bench)
        assert "rest_ms" not in facts and facts["decode_ms"] == pytest.approx(20)


def test_rows_of_an_evaluation_leave_out_the_answers_and_nothing_else():
    rows = [{"task": "a", "items": [1], "score": 0.5, "kind": "x"}]
    assert Evaluation({}, rows, []).scores() == [{"task": "a", "score": 0.5, "kind": "x"}]
