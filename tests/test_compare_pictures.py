"""regard compare on images, with the shipped vision-language model."""

import json
from types import SimpleNamespace

import pytest

from regard import catalog
from regard.bench.compare import compare
from regard.bench.pictures import Reader
from regard.cli import app
from regard.core import Unsupported
from regard.report.picture_page import show_pictures
from regard.report.pictures import PictureResult


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    result = compare(
        "shipped:vlm",
        ["vcd", "fastervlm:keep=0.25"],
        ["pope:split=random", "chair"],
        out=folder,
        samples=4,
        workers=1,
    )
    return folder, result


def test_every_row_is_beside_its_controls(run):
    _, result = run
    labels = [row["label"] for row in result.of("chair")]
    assert labels == ["full", "vcd", "fastervlm(keep=0.25)", "random_tokens(keep=0.25)", "uniform_grid(keep=0.25)",
                      "downsampling(keep=0.25)"]  # fmt: skip
    assert not result.failed()
    for row in result.rows:
        if row["method"] == "full":
            assert row["gain"] == 0 and row["passes"] == 1
            continue
        assert row["neutral"] == 0, f"{row['label']} at its neutral setting is not the base"
        assert row["time_ratio"] > 0 and len(row["gain_interval"]) == 2
    kept = {row["label"]: row["kept"] for row in result.of("chair")}
    assert kept["fastervlm(keep=0.25)"] == kept["random_tokens(keep=0.25)"] == pytest.approx(0.25)
    vcd = next(row for row in result.of("chair") if row["method"] == "vcd")
    assert 1.9 < vcd["passes"] < 2.1 and "shuffled" in vcd
    rules = next(row for row in result.rows if row["metric"] == "yes_no")["rules"]
    assert set(rules) == {"first token", "opera", "vcd", "lmms_eval", "vlmevalkit"}


# what these need before they act on this model; a row says it
LACKS = {"icd": "a disturbance: prefix=ids", "dyvte": "trained routers", "pine": "document"}


@pytest.mark.usefixtures("measured_here")
def test_every_method_on_images_has_a_row_or_the_row_says_what_it_lacks(tmp_path):
    pages = [
        (name, catalog.get(name))
        for kind in ("steering", "tokens")
        for name in catalog.list_methods(kind=kind)
    ]
    names = [name for name, page in pages if getattr(page, "acts_on_models", True)]
    result = compare("shipped:vlm", names, ["ocr"], out=tmp_path, samples=1, workers=1)
    failed = {row["label"]: row["error"] for row in result.failed()}
    assert {*failed} == {*LACKS}
    assert all(LACKS[label] in error for label, error in failed.items()), failed
    rows = {row["label"]: row for row in result.of("ocr")}
    assert "shuffled" not in rows["carve"]  # it reads places of the picture
    assert "shuffled" in rows["pai"]


def test_the_report_says_what_was_found(run, capsys):
    from rich.console import Console

    folder, result = run
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "Content-Security-Policy" in page and "fastervlm" in page and "CHAIR_I" in text
    assert "The same answers, read by five rules" in page and result.sentence() in text.replace("\\_", "_")
    show_pictures(result, Console(width=80))
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines()) and "the model as it is" in shown


def test_the_same_command_goes_on_where_it_was(run):
    folder, result = run
    before = (folder / "results.jsonl").read_text()
    again = compare("shipped:vlm", ["vcd", "fastervlm:keep=0.25"], ["pope:split=random", "chair"], out=folder,
                    samples=4, workers=1)  # fmt: skip
    assert (folder / "results.jsonl").read_text() == before and len(again.rows) == len(result.rows)


@pytest.mark.usefixtures("measured_here")
def test_a_picture_that_cannot_be_read_is_a_row(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_bytes(b"nothing")
    line = {"image": "a.png", "question": "is there a red circle ?", "answer": "no"}
    (tmp_path / "own" / "asked.jsonl").write_text(json.dumps(line) + "\n")
    result = compare("shipped:vlm", [], ["pope"], out=tmp_path / "run", images=tmp_path / "own", workers=1)
    assert [row["status"] for row in result.rows] == ["failed"] and "a.png" in result.rows[0]["error"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all about images, or all about text"):
        compare("shipped:vlm", [], ["pope", "needle"], out=tmp_path)
    with pytest.raises(ValueError, match="ask a vision-language model"):
        compare("shipped:lm", ["vcd"], ["pope"], out=tmp_path)
    with pytest.raises(Unsupported, match="steering and tokens pages"):
        compare("shipped:vlm", ["h2o"], ["pope"], out=tmp_path)
    with pytest.raises(ValueError, match="no lengths"):
        compare("shipped:vlm", ["vcd"], ["pope"], [512], out=tmp_path)
    with pytest.raises(ValueError, match="a visual token or more"):
        compare("shipped:vlm", ["fastervlm:keep=0"], ["pope"], out=tmp_path)


def test_verdicts_follow_from_the_intervals():
    row = {
        "method": "vcd",
        "label": "vcd",
        "task": "pope",
        "status": "ok",
        "metric": "yes_no",
        "works": False,
    }
    row |= {"over_control_interval": [-0.1, 0.1], "gain_interval": [0.01, 0.2], "kind_of_method": "steering"}
    result = PictureResult({}, [row])
    assert result.verdict(row) == "as its control"
    assert result.verdict({**row, "gain_interval": [-0.1, 0.2]}) == "no effect shown"
    assert result.verdict({**row, "over_control_interval": [-0.2, -0.1]}) == "worse than its control"
    assert result.verdict({**row, "works": True}) == "works"
    assert result.verdict({**row, "gain_interval": [-0.3, -0.1]}) == "worse, as its control"
    assert result.verdict({**row, "gain_interval": [0.0, 0.0]}) == "changes no answer"
    assert result.verdict({**row, "status": "timeout"}) == "timeout"


def test_a_reduction_is_beside_random_tokens_of_its_own_budget():
    def row(method, kept, scores):
        samples = [{"image": str(i), "score": s} for i, s in enumerate(scores)]
        facts = dict(task="pope", status="ok", metric="yes_no", kind_of_method="tokens")
        return {"method": method, "label": method, "kept": kept, "samples": samples, **facts}

    few, many = row("random_tokens", 0.1, [0.0] * 8), row("random_tokens", 0.5, [1.0] * 8)
    ours = row("fastervlm", 0.5, [0.0] * 8)
    assert PictureResult({}, [few, many, ours]).verdict(ours) == "below random"
    assert PictureResult({}, [few, ours]).verdict(ours) == "not at random's budget"


def test_a_token_that_begins_yes_and_no_says_neither():
    def tokenizer(word, add_special_tokens):
        return {"input_ids": ([0] if word[0] == " " else []) + [1 + "yYnN".index(word.strip()[0])]}

    tokenizer.unk_token_id = -1
    reader = Reader(None, SimpleNamespace(tokenizer=tokenizer), "yes_no")
    assert reader.yes_and_no() == ([1, 2], [3, 4])


@pytest.mark.usefixtures("measured_here")
def test_the_command(run, tmp_path):
    from typer.testing import CliRunner

    done = CliRunner().invoke(
        app, ["compare", "--model", "shipped:vlm", "--tasks", "ocr", "--methods", "fastervlm", "--samples", "4",
              "--workers", "1", "--out", str(tmp_path / "run"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert {row["verdict"] for row in said["rows"]} <= {"", "as random", "above random", "below random"}
