"""Runs side by side in one folder, texts of one's own, and devices."""

import json

import pytest
from tests.golden import unpacked
from typer.testing import CliRunner

from regard.cli import app
from regard.train import Plan, train
from regard.train.several import caveat, compared, train_several
from regard.train.tasks import Text

SMALL = dict(
    steps=4, every=2, rates=(1e-2, 3e-3), length=16, pairs=2, vocab=16, tested=8, batch=4, width=8, layers=1
)
NAMES = ("softmax", "linear_attention:eps=0.1", "linear_attention")


class Stop(Exception):
    pass


def plans(**options):
    settings = {"linear_attention:eps=0.1": {"linear_attention": {"eps": 0.1}}}
    return {
        name: Plan(
            mechanisms=(name.partition(":")[0],), settings=settings.get(name, {}), **{**SMALL, **options}
        )
        for name in NAMES
    }


def results(found: dict) -> dict:
    return {n: {k: r[k] for k in ("scores", "rate", "score")} for n, r in found["runs"].items()}


def test_runs_side_by_side_are_what_each_is_alone_and_go_on(tmp_path):
    alone = {name: train(plan, tmp_path / f"{i}") for i, (name, plan) in enumerate(plans().items())}
    heard = []

    def hear(point):
        heard.append((point["run"], point["done"]))
        if len(heard) in (3, 14):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            train_several(plans(), tmp_path / "all", hear)
    found = train_several(plans(), tmp_path / "all", hear)
    assert results(found) == results({"runs": alone})
    assert (
        heard[-1] == ("linear_attention", 24) and heard[3][1] == 3
    )  # one point behind the checkpoint is heard again
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(
        ["softmax", "linear_attention-eps=0.1", "linear_attention", "run.json", "result.json", "report.html"]
    )
    assert train_several(plans(), tmp_path / "all") == found
    with pytest.raises(ValueError, match=r"of the same run.*steps=\(4, 5\)"):
        train_several(plans(steps=5), tmp_path / "all")


def test_the_report_has_a_curve_for_each_run_and_leads_to_its_own(tmp_path):
    found = train_several(plans(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    figures = unpacked(page, "figures")
    assert sorted(figures) == ["loss", "score"]
    for figure in figures.values():
        assert sorted(line["name"] for line in figure["data"]) == sorted(NAMES)
        assert all(line["x"] == [2, 4] for line in figure["data"])  # of the best rate alone
    for folder in ("softmax", "linear_attention-eps=0.1", "linear_attention"):
        assert f'href="{folder}/report.html"' in page and (tmp_path / folder / "report.html").exists()
    assert found["sentence"] in page.replace("&#x27;", "'")


def test_the_sentence_puts_the_best_first_and_says_what_to_hold_against_it():
    facts = lambda n: {"parameters": n}  # noqa: E731
    runs = {"softmax": {"score": 0.5, "facts": facts(100)}, "gla": {"score": 0.75, "facts": facts(120)}}
    said = compared(Plan(**SMALL), runs)
    assert said.startswith(
        "Held-out accuracy on mqar after 4 steps, each at the best of 2 learning rates: gla 75.0%, "
    )
    assert "rates were chosen on the same held-out data" in said and "softmax 100, gla 120" in said
    text = Plan(task="text", **{**SMALL, "rates": (1e-2,)})
    said = compared(text, runs)
    assert "at rate 0.01: softmax 0.500, gla 0.750" in said  # fewer bits are better
    assert "chosen" not in said  # there was one rate
    alike = {name: {**run, "facts": facts(100)} for name, run in runs.items()}
    assert "Parameters" not in caveat(alike, chosen=False) and "chosen" not in caveat(alike, chosen=False)


def test_runs_differ_in_their_mechanisms_alone(tmp_path):
    two = {"a": Plan(**SMALL), "b": Plan(**{**SMALL, "steps": 5})}
    same = {"a b": Plan(**SMALL), "a/b": Plan(**SMALL)}
    with pytest.raises(ValueError, match=r"differ in their mechanisms alone.*steps=\[4, 5\]"):
        train_several(two, tmp_path / "out")
    with pytest.raises(ValueError, match="names of their own"):
        train_several(same, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_trains_each_mechanism_that_is_named(tmp_path):
    sizes = {**{k: v for k, v in SMALL.items() if k != "tested"}, "rates": "1e-2"}
    words = ["train", *(f"--{k}={v}" for k, v in sizes.items()), "--out", str(tmp_path / "run"), "--json"]
    several = [word for name in (*NAMES[:2], "softmax,linear_attention") for word in ("--mechanism", name)]
    run = CliRunner().invoke(app, [*words, *several, "--layers=2"])
    assert run.exit_code == 0, run.output
    assert list(json.loads(run.stdout)["runs"]) == [*NAMES[:2], "softmax,linear_attention"]
    assert (tmp_path / "run" / "softmax-linear_attention" / "best" / "model.safetensors").exists()


# Texts of one's own


def test_a_text_of_ones_own_is_trained_on_and_held_out(tmp_path):
    text = "".join(f"{i} is a number. " for i in range(200))
    (tmp_path / "own.txt").write_text(text)
    own = {**SMALL, "task": "text", "text": str(tmp_path / "own.txt")}
    plan = Plan(**own)
    assert bytes(Text.all(plan).tolist()).decode() == text
    result = train(plan, tmp_path / "run")
    assert "on text of own.txt: bits per byte" in result["sentence"]
    (tmp_path / "own.txt").write_text(text.replace("number", "figure"))
    assert bytes(Text.all(plan).tolist()).decode() == text  # read once
    with pytest.raises(ValueError, match=r"the same run.*text_sha256"):
        train(Plan(**own), tmp_path / "run")
    assert "text" not in Plan(**SMALL).to_dict()


TEXTS = {
    "missing": (None, "the text file exists"),
    "empty": (b"", "at least 200 characters of text"),
    "binary": (bytes(range(32)) * 99, "no zero bytes"),
    "latin": ("café ".encode("latin1") * 99, "a text file is UTF-8"),
    "short": (b"words " * 40, r"1,301 bytes at least for sequences of 128.*bytes=240"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_text_is_refused_before_anything_is_made(tmp_path, name):
    held, rule = TEXTS[name]
    if held is not None:
        (tmp_path / name).write_bytes(held)
    words = ["train", "--task", "text", "--text", str(tmp_path / name), "--out", str(tmp_path / "run")]
    run = CliRunner().invoke(app, words)
    with pytest.raises(ValueError, match=rule) as error:
        raise run.exception
    assert str(tmp_path / name) in str(error.value) and not (tmp_path / "run").exists()


def test_the_shortest_text_that_is_taken_can_be_trained_on(tmp_path):
    for extra in (0, -1):
        (tmp_path / "own.txt").write_bytes(b"x" * (1301 + extra))
        made = lambda: Plan(task="text", length=128, text=str(tmp_path / "own.txt"))  # noqa: E731
        if extra:
            with pytest.raises(ValueError, match="1,301 bytes at least"):
                made()
        else:
            assert Text.batch(made(), 0)[0].shape == (32, 128) and len(Text.test(made())[0]) == 1
