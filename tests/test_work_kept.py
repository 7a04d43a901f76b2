"""What was computed or written is not lost, and nothing old passes for new: folders, texts, models, Ctrl-C, scripts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.bench import asked as asking
from regard.bench import compare as comparing
from regard.bench.compare import compare
from regard.bench.executor import InProcess, guarded
from regard.claims import ledger
from regard.cli import app, main
from regard.cli.console import Stopped
from regard.models.revision import revision
from regard.models.shipped import SHIPPED, load_shipped
from regard.report import Result
from regard.report.folder import PART, Folder, fill, vacant
from regard.tasks import Source, held_out
from regard.train import Plan, train

CELLS = [
    "--no-timing",
    "--methods",
    "streaming_llm",
    "--tasks",
    "needle",
    "--lengths",
    "96",
    "--budgets",
    "0.5",
    "--samples",
    "1",
]


def invoke(*words: str):
    return CliRunner().invoke(app, [*map(str, words)])


def small(out, model=None, task="needle", method="streaming_llm", **options):
    """A comparison of two cells in this process."""
    return compare(
        model,
        [method],
        [task],
        [96],
        [0.5],
        out=out,
        samples=1,
        timing=False,
        executor=InProcess(),
        **options,
    )


@pytest.fixture(scope="module")
def shipped():
    return load_shipped("lm")


# Folders


def test_a_folder_is_filled_whole_and_what_is_there_stays(tmp_path):
    def write(folder, text="new"):
        for name in ("a", "marker", "z"):
            (folder / name).write_text(text)

    (tmp_path / "out").mkdir()
    vacant(tmp_path / "out")
    # somebody writes there while the work goes on
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(ValueError, match=r"new or empty.*holds=\['note'\]"):
        vacant(tmp_path / "out")
    fill(tmp_path / "out", write, last="marker")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "marker", "note", "z"]
    with pytest.raises(ValueError, match="what was made is whole"):
        fill(tmp_path / "out", lambda folder: write(folder, "newer"), last="marker")
    assert (tmp_path / "out" / "a").read_text() == "new" and (
        tmp_path / "out" / PART / "a"
    ).read_text() == "newer"
    fill(tmp_path / "out", lambda folder: write(folder, "newest"), last="marker", replace=True)
    assert (tmp_path / "out" / "a").read_text() == "newest" and (
        tmp_path / "out" / "note"
    ).read_text() == "mine"
    assert not (tmp_path / "out" / PART).exists()


def test_the_best_model_of_a_run_leaves_what_lies_beside_it(tmp_path):
    plan = Plan(steps=2, every=2, rates=(1e-3, 1e-2), length=32, pairs=4, vocab=32, tested=4, width=16)
    (tmp_path / "best").mkdir()

    def hear(point):
        (tmp_path / "best").mkdir(exist_ok=True)
        (tmp_path / "best" / "note.txt").write_text("mine")

    (tmp_path / "best").rmdir()
    train(plan, tmp_path, hear)
    assert {"note.txt", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "best").iterdir()}


@pytest.mark.parametrize("text", ["no json", "[1]", '{"mine": 1}'])
def test_a_run_json_of_somebody_else_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for words in (["compare", *CELLS, "--workers", "1"], ["train", "--steps", "1"]):
        error = invoke(*words, "--out", tmp_path).exception
        assert isinstance(error, ValueError) and "run.json of the output folder is of a run" in str(error)
    assert (tmp_path / "run.json").read_text() == text


def test_a_folder_that_can_no_longer_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "run")
    folder.open({"settings": {}})
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path / "run", tmp_path / "new" / "run"):
        with pytest.raises(ValueError, match="can be written to"):
            Folder(path).open({"settings": {}})
    assert not (tmp_path / "new").exists()


def test_claims_ask_whether_they_can_be_recorded_before_they_are_measured(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(ledger, "measure", lambda *_: pytest.fail("measured"))
    assert "can be written to" in str(invoke("claims", "jrt", "--record").exception)


# Ctrl-C


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "where", "said"),
    [
        (
            ["convert", "shipped:lm"],
            "regard.bench.conversion.convert_folder",
            "Finished stages are kept in {out}, the one under way up to its last checkpoint, one in 50 steps",
        ),
        (
            ["compare"],
            "regard.bench.compare.compare",
            "Finished cells are kept in {out}; the same command goes on",
        ),
        (["train"], "regard.train.run.train", "kept in {out} up to its last checkpoint, one in 50 steps"),
        (["claims", "jrt"], "regard.claims.ledger.measure", "Nothing is kept"),
        (["list"], "regard.catalog.list_methods", ""),
    ],
)
def test_ctrl_c_says_what_is_true(words, where, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(where, stop)
    out = ["--out", str(tmp_path)] if "{out}" in said or words[0] == "convert" else []
    monkeypatch.setattr(sys, "argv", ["regard", *words, *out])
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().err.split("stopped.")[1].split())
    assert ended.value.code == 130
    assert said.format(out=tmp_path) in told and bool(told) == bool(said)
    assert not issubclass(Stopped, KeyboardInterrupt)


# Texts of one's own


TEXTS = {
    "missing.txt": (None, "the text file exists"),
    "empty.txt": (b"", "at least 200 characters of text"),
    "binary.txt": (bytes(range(32)) * 99, "no zero bytes"),
    "latin.txt": (
        "caf\u00e9 ".encode("latin1") * 99,
        "is not, at byte 3 (0xe9); where it is text in another encoding",
    ),
    "weights.txt": (b"\x93NUMPY" + bytes(999), "a text file is UTF-8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_text_ends_the_run_before_it_begins(tmp_path, name):
    held, rule = TEXTS[name]
    if held is not None:
        (tmp_path / name).write_bytes(held)
    for words in (["compare", *CELLS], ["convert", "shipped:lm"]):
        error = invoke(*words, "--text", tmp_path / name, "--out", tmp_path / "out").exception
        assert isinstance(error, ValueError) and rule in str(error) and str(tmp_path / name) in str(error)
    assert not (tmp_path / "out").exists()


def prompts(result: Result) -> list:
    return [(r["key"], r["nll"]) for r in result.rows]


def test_a_text_is_known_by_its_content(tmp_path, shipped):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(held_out().text[:20_000])
    first = small(tmp_path / "out", shipped, task="perplexity", text=text)
    text.write_text(held_out().text[20_000:40_000])
    second = small(tmp_path / "out", shipped, task="perplexity", text=text)
    assert len(second.rows) == 2 and not {r["nll"] for r in first.rows} & {r["nll"] for r in second.rows}
    text.write_text(held_out().text[:20_000])
    assert prompts(small(tmp_path / "out", shipped, task="perplexity", text=text)) == prompts(first)
    assert len(Folder(tmp_path / "out").rows()) == 4  # nothing was measured a third time, nothing was lost
    other.write_bytes(text.read_bytes())
    assert prompts(small(tmp_path / "elsewhere", shipped, task="perplexity", text=other)) == prompts(first)


def test_a_text_that_changes_during_the_run_is_a_row_that_says_so(tmp_path, shipped):
    text = tmp_path / "text.txt"
    text.write_text(held_out().text[:20_000])

    def change(row, done, total):
        text.write_text(held_out().text[20_000:40_000])

    result = compare(shipped, ["streaming_llm"], ["perplexity"], [96, 64], [0.5], out=tmp_path / "out", samples=1,
                     executor=InProcess(), text=text, progress=change)  # fmt: skip
    assert {r["status"] for r in result.rows} == {"failed"}
    assert "the one the run began with" in result.rows[0]["error"]


# Models and pages of one's own


def test_a_model_is_known_by_its_weights(tmp_path):
    model, tokenizer = load_shipped("lm")
    before = revision((model, tokenizer))
    first = small(tmp_path / "out", (model, tokenizer))
    assert prompts(small(tmp_path / "out", (model, tokenizer))) == prompts(first)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert not {r["nll"] for r in small(tmp_path / "out", (model, tokenizer)).rows} & {
        r["nll"] for r in first.rows
    }
    assert revision((model, tokenizer)) != before
    assert revision((model.to("meta"), object()))  # as where weights are offloaded: by names and shapes


def test_a_folder_of_a_model_is_known_by_its_files(tmp_path):
    model, tokenizer = load_shipped("lm")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before, weights = revision(tmp_path), tmp_path / "model.safetensors"
    (tmp_path / "README.md").write_text("a card")
    held = bytearray(weights.read_bytes())
    os.utime(weights)
    assert revision(tmp_path) == before
    held[len(held) // 2] ^= 1
    weights.write_bytes(held)
    assert revision(tmp_path) != before and revision(SHIPPED["lm"]) is not None
    assert revision("no/such-model") is None


def test_a_model_that_is_trained_on_in_its_folder_is_measured_anew(tmp_path):
    model, tokenizer = load_shipped("lm")
    tokenizer.save_pretrained(tmp_path / "model")
    found = []
    for factor in (1.0, 1.5):
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        model.save_pretrained(tmp_path / "model")
        found.append(small(tmp_path / "out", str(tmp_path / "model"), device="cpu"))
    assert [len(r.rows) for r in found] == [2, 2] and not {r["nll"] for r in found[0].rows} & {
        r["nll"] for r in found[1].rows
    }


PAGE = """
from regard.methods.caches.streaming_llm import METHOD as BASE
METHOD = BASE
# {}
"""


def test_a_page_of_ones_own_is_known_by_its_file(tmp_path, shipped, monkeypatch):
    page = tmp_path / "my_stream.py"
    page.write_text(PAGE.format("one"))
    monkeypatch.setattr(catalog, "_registered", {})
    regard.register(page)
    first = small(tmp_path / "out", shipped, method="my_stream")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["content"]["my_stream"]
    page.write_text(PAGE.format("two"))
    second = small(tmp_path / "out", shipped, method="my_stream")
    keys = [{r["method"]: r["key"] for r in result.rows} for result in (first, second)]
    assert keys[0]["full"] == keys[1]["full"] and keys[0]["my_stream"] != keys[1]["my_stream"]


MECHANISM = """
from regard.methods.mechanisms.linear.linear_attention import METHOD as BASE
METHOD = BASE
# {}
"""


def test_a_training_run_does_not_go_on_with_another_page_of_that_name(tmp_path, monkeypatch):
    page, sizes = (
        tmp_path / "my_linear.py",
        dict(steps=2, every=2, rates=(1e-3,), length=32, pairs=4, vocab=32, width=16),
    )
    page.write_text(MECHANISM.format("one"))
    monkeypatch.setattr(catalog, "_registered", {})
    regard.register(page)
    plan = Plan(mechanisms=("my_linear",), **sizes)
    assert train(plan, tmp_path / "out") == train(plan, tmp_path / "out")
    page.write_text(MECHANISM.format("two"))
    with pytest.raises(ValueError, match=r"the same run.*pages="):
        train(plan, tmp_path / "out")
    assert "pages" not in Plan(**sizes).to_dict()


# Failed cells


@pytest.mark.usefixtures("measured_here")
def test_a_failed_cell_is_tried_again_and_the_status_is_one(tmp_path, monkeypatch):
    words = ["compare", *CELLS, "--workers", "1", "--out", str(tmp_path / "out")]
    failed = invoke(*words[:-2], "--lengths", "4", "--out", str(tmp_path / "short"))
    assert failed.exit_code == 1
    said = failed.stderr.split("regard: ")[1]
    assert said.startswith(
        "2 of 2 cells failed; the first, full on needle at length 4: failed: ValueError: must hold"
    )
    cells = asking.grid(["streaming_llm"], ["needle"], [96], [0.5], 1, 0, None, None, timing=False)
    cells = comparing.with_revisions(cells, None)
    folder = Folder(tmp_path / "out")
    folder.open(comparing.header("the shipped model 'lm'", cells))
    for cell in cells:
        folder.add(cell.row(status="failed", error="no text yet"))
    left = invoke(*words, "--no-retry")
    assert (
        left.exit_code == 1
        and "2 of 2 cells failed; the first, full on needle at length 96: failed: no text" in left.stderr
    )
    mended = invoke(*words, "--json")
    assert mended.exit_code == 0, mended.output
    assert [r["status"] for r in json.loads(mended.stdout)["rows"]] == ["ok", "ok"]


# Scripts


SCRIPT = """
import regard
print("begins")
asked = dict(out="out", samples=1, workers=1, timing=False)
result = regard.compare(None, ["streaming_llm"], ["needle"], [96], [0.5], **asked)
print(len(result.rows), len(result.failed()))
"""
# one whose model no worker can load, and that goes on
BROKEN = """
try:
    regard.compare("no/such-model", ["streaming_llm"], ["needle"], [96], [0.5], **{**asked, "out": "other"})
except RuntimeError as error:
    print(str(error).replace("\\n", " "))
"""
GUARDED = """
import regard
print("begins")
if __name__ == "__main__":
    asked = dict(out="out", samples=1, workers=1, timing=False)
    print(len(regard.compare(None, ["streaming_llm"], ["needle"], [96], [0.5], **asked).rows))
"""


def script(tmp_path, text) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)


def test_a_script_of_three_lines_works_and_is_not_run_by_the_workers(tmp_path):
    """Where they cannot load its model it is told that rule."""
    done = script(tmp_path, SCRIPT + BROKEN)
    assert done.returncode == 0, done.stderr
    begins, found, rule = done.stdout.splitlines()
    assert (begins, found) == ("begins", "2 0") and "no model can be loaded" in rule
    assert "workers do not run " in rule and "if __name__ == '__main__':" in rule


def test_a_script_from_the_standard_input_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-"], input=SCRIPT, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begins", "2 0"]


def test_a_guarded_script_is_imported_by_the_workers_as_python_does(tmp_path):
    done = script(tmp_path, GUARDED)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["2", "begins", "begins"]


def test_what_counts_as_a_guard():
    assert guarded("if '__main__' == __name__:\n    go()") and guarded(
        "if ok and __name__ == '__main__':\n    go()"
    )
    assert not guarded("name = __name__\ngo()")


def test_a_source_says_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 50)
    assert Source.from_path(tmp_path / "a.txt").revision == Source("elsewhere", "word " * 50).revision


@pytest.mark.usefixtures("measured_here")
def test_a_run_grows(tmp_path):
    """The same folder takes another method and another length: what is there is not measured again."""
    asked = dict(tasks=["needle"], budgets=[0.5], out=tmp_path / "run", samples=1, workers=1, timing=False)
    first = compare(None, ["streaming_llm"], lengths=[96], **asked)
    seen = []
    count = lambda row, done, total: seen.append((row is None, done, total))  # noqa: E731
    both = compare(None, ["knorm"], lengths=[96, 128], progress=count, **asked)
    assert seen[0] == (True, 1, 4) and len(both.rows) == 5
    assert {r["label"] for r in both.rows} == {"full", "streaming_llm", "knorm"} and both.lengths() == [
        96,
        128,
    ]
    assert {r["key"] for r in first.rows} < {r["key"] for r in both.rows}
    with pytest.raises(ValueError, match="of the same run"):
        compare(None, ["knorm"], lengths=[96], **asked, seed=1)


def test_a_run_that_grows_over_another_text_is_of_the_new_one_alone(tmp_path, shipped):
    text = tmp_path / "text.txt"
    text.write_text(held_out().text[:20_000])
    small(tmp_path / "out", shipped, task="perplexity", text=text)
    text.write_text(held_out().text[20_000:40_000])
    found = small(tmp_path / "out", shipped, task="perplexity", text=text, method="knorm")
    assert [r["label"] for r in found.rows] == ["full", "knorm"]
    grown = small(tmp_path / "out", shipped, task="perplexity", text=text)
    assert [r["label"] for r in grown.rows] == ["full", "knorm", "streaming_llm"]
