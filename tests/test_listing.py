"""regard list: what fits; a word that nothing answers to is an error with the near ones; names stay whole."""

import json

import pytest
from typer.testing import CliRunner

from regard import catalog
from regard.cli import app, console


def invoke(*words: str):
    return CliRunner().invoke(app, ["list", *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pattern", "causal"], "no pattern is called 'causal'; near names: causal_self, causal_cross"),
        (["--kind", "maks"], "no kind of page is called 'maks'; near names: mask"),
        (["--family", "lineer"], "no family is called 'lineer'; near names: linear"),
        (["--needs", "decoder-ml"], "no need is called 'decoder-ml'; near names: decoder-lm"),
        (["glaa"], "no page is called 'glaa'; near names: gla"),
        (["gla", "--needs", "decoder-lm"], "(name='gla', needs='decoder-lm')"),
        (["--kind", "mask", "--family", "linear"], "(kind='mask', family='linear')"),
        (["--kinds", "--kind", "mask"], "--kinds lists all kinds"),
        (["gla", "--kinds"], "--kinds lists all kinds"),
    ],
)
def test_a_word_that_nothing_answers_to(words, says):
    for more in ([], ["--json"], ["--markdown"]):
        result = invoke(*words, *more)
        assert says in str(result.exception) and not result.stdout


def test_what_fits_is_listed():
    rows = json.loads(invoke("gl*", "--pattern", "causal_self", "--family", "linear", "--json").stdout)
    assert "gla" in [row["name"] for row in rows]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_and_kinds_stay_whole(width, monkeypatch):
    monkeypatch.setattr(console.out, "_width", width)
    lines = invoke().stdout.splitlines()
    begin = {tuple(line.split()[:2]) for line in lines if line.strip()}
    assert begin >= {(name, page.kind) for name, page in catalog.every()}
    assert max(map(len, lines)) <= width
