"""regard show: text, settings, claim and example of a page, as people and as programs read them."""

import json

import pytest
from typer.testing import CliRunner

from regard import catalog
from regard.claims import ledger
from regard.cli import app, console
from regard.cli.page_source import docstring, options
from regard.cli.page_words import docstring_lines, kept_lines

OWN = '''"""Own: nothing moves.

    o = v          the value itself

Prose that goes on
over two lines.

>>> 1 + 1
2
"""

from dataclasses import dataclass

from regard.core import Card, mask
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    # of the text,
    # both lines
    above: int = 3
    beside: float = float("inf")  # of the cache
    silent: tuple[int, ...] = (1, 2)
    muted: int = 0  # noqa: E501


METHOD = MaskPage(
    config=Config,
    build=lambda cfg: mask.window(cfg.above),
    patterns=("causal_self",),
    card=Card(title="Own [bold]", paper="none", year=2025, idea="nothing", neutral={"above": 2**40}),
)
'''


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def said(*words: str) -> str:
    result = invoke("show", *words)
    assert result.exit_code == 0, result.exception
    return result.stdout


@pytest.fixture
def own(tmp_path, monkeypatch):
    path = tmp_path / "own_window.py"
    path.write_text(OWN)
    monkeypatch.setenv("REGARD_PAGES", str(path))
    return path


def test_a_page_of_ones_own_says_all_that_it_has(own):
    text = said("own_window")
    assert "Own [bold]  (own_window, mask)" in text, "a title is no markup"
    assert "    o = v          the value itself" in text and ">>> 1 + 1\n2\n" in text
    assert "Prose that goes on over two lines." in text
    assert "neutral  above = 2**40" in text
    assert f"     path  {own}" in text.splitlines(), "whole and on one line"


def test_what_the_source_says_of_settings(own):
    assert options(catalog.get("own_window")) == [
        {"name": "above", "default": 3, "says": "of the text, both lines"},
        {"name": "beside", "default": float("inf"), "says": "of the cache"},
        {"name": "silent", "default": (1, 2), "says": ""},
        {"name": "muted", "default": 0, "says": ""},
    ]


def test_settings_of_a_class_below_and_of_pages_laid_over():
    says = {option["name"]: option["says"] for option in options(catalog.get("block_topk"))}
    assert says["block_q"] == "queries that choose together" and says["top_k"] == "blocks"
    names = [option["name"] for option in options(catalog.get("snapkv+adakv"))]
    assert names == ["budget", "window", "pool", "adakv.floor"]


@pytest.mark.parametrize("name", list(catalog.pages()))
def test_every_page_has_a_text_that_fits(name):
    text = docstring(catalog.path_of(name))
    assert text
    for width in (60, 80, 120):
        lines = [line for line, _ in docstring_lines(text, width)]
        assert "".join("".join(lines).split()) == "".join(text.split()), "nothing is lost"
        long = [line for line in lines if len(line) > width and len(line.split()) > 1]
        assert not long, long


def test_equations_keep_their_lines():
    line = "    s = q · k" + " " * 12 + "of all keys"
    assert kept_lines(line, 80) == [line]
    assert kept_lines(line, 30) == ["    s = q · k", "        of all keys"]


def test_everything_as_data(own):
    facts = json.loads(said("own_window", "--json"))
    assert facts["text"] == docstring(own) and facts["path"] == str(own)
    assert facts["options"][1] == {"name": "beside", "default": None, "says": "of the cache"}
    assert facts["settings"]["above"] == 3 and facts["card"]["year"] == 2025 and facts["claim"] is None
    assert facts["mask"]["heads"] == 1 and "attend" in facts["verb"]


def test_a_claim_in_words_a_line_for_each_model(monkeypatch):
    row = {"name": "h2o", "statement": "it works", "bound": "x > 0", "verdict": "holds"}
    measured = {"share": 0.123456, "count": 12345, "loss": {"full": 0.00621, "ours": 2.3975}}
    rows = [
        {
            **row,
            "model": "lm",
            "verdict": "contradicted",
            "note": "too small",
            "measured": {"by": [1.0, 2.5]},
        },
        {**row, "model": "smollm2", "measured": measured},
    ]
    monkeypatch.setattr(ledger, "recorded", lambda: {"h2o": rows})
    lines = [" ".join(line.split()) for line in said("h2o").splitlines()]
    at = lines.index("measured holds on smollm2: share 0.123, count 12345,")
    assert lines[at - 2 : at] == ["claim it works", "bound x > 0"]
    wanted = ["loss (full 0.00621, ours 2.4)", "contradicted on lm: by [1, 2.5]", "too small"]
    assert lines[at + 1 : at + 4] == wanted


def test_a_task_shows_what_it_asks():
    text = said("needle:digits=3")
    example = json.loads(said("needle:digits=3", "--json"))["example"]
    assert len(example["answer"]) == 3 and f"The code of {example['question'].split()[-2]} is" in text
    assert (
        f"   answer  {example['answer']}" in text
        and "   metric  exact: the answer is generated exactly" in text
    )
    assert example["needed"][0].endswith(f"{example['answer']}.") and len(example["prompt"]) > 100


@pytest.mark.parametrize("name", catalog.list_methods(kind="task"))
def test_every_task_has_an_example(name):
    facts = json.loads(said(name, "--json"))
    assert facts["example"] and facts["task"]["metric"] == catalog.get(name).metric
    assert "answer" in facts["example"] or "objects" in facts["example"] or "labels" in facts["example"]


def test_the_answer_is_what_is_wanted_where_the_model_speaks_freely():
    example = json.loads(said("gcog", "--json"))["example"]
    assert [example["answer"]] == example["wanted"] and example["question"].startswith("Question: ")


def test_pages_laid_over_one_another():
    facts = json.loads(said("snapkv+adakv", "--json"))
    assert [part["name"] for part in facts["parts"]] == ["snapkv", "adakv"]
    assert facts["card"]["title"] == "SnapKV + Ada-KV" and "adakv" in facts["verb"]
    text = said("snapkv+adakv")
    assert all(f"  {part['path']}" in text for part in facts["parts"]) and "adakv.floor" in text


def test_the_file_as_it_is(own):
    assert said("own_window", "--source") == OWN
    assert said("gla", "--source") == catalog.path_of("gla").read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["snapkv+adakv", "--source"], "a file is of one page"),
        (["gla", "--source", "--json"], "--source stands alone"),
        (["window:window=3", "--source"], "--source stands alone"),
        (["glaa", "--source"], "near names: gla"),
        (["snapkv+adakw"], "near names: adakv"),
        (["adakv+snapkv"], "is laid over another method"),
        (["needle:digit=3"], "near names: digits"),
        (["needle", "--picture", "a.svg"], "a task reads nothing"),
    ],
)
def test_what_is_not_shown_is_an_error(words, says):
    assert says in str(invoke("show", *words).exception)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(width, monkeypatch):
    monkeypatch.setattr(console.out, "_width", width)
    for name in ("gla", "moa_spans", "block_topk", "vssd", "needle"):
        for line in said(name).splitlines():
            assert len(line) <= width or "path  " in line, line
