"""The command line as a whole: errors under --json, versions, completion, and what is not imported for them."""

import json
import math
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from regard import catalog, cli
from regard.cli.console import say_json
from regard.cli.names import complete_kind, complete_page, complete_pages, complete_tasks
from regard.core import Unsupported


def ended(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["regard", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["show", "glaa"], "KeyError", "no method is called 'glaa'; near names: gla"),
        (["show", "adakv+snapkv"], "Unsupported", "is laid over another method"),
        (["list", "--pattern", "causal"], "KeyError", "near names: causal_self"),
        (["list", "--nothing"], "NoSuchOption", "--nothing"),
        (["show"], "MissingParameter", "NAME"),
        (["nothing"], "UsageError", "nothing"),
        (["new", "mask", "Upper"], "ValueError", "a lower-case Python name"),
    ],
)
def test_errors_are_json_where_it_is_asked_for(words, kind, says, monkeypatch, capsys):
    assert ended(monkeypatch, *words, "--json") == 2
    printed = capsys.readouterr()
    assert not printed.err
    error = json.loads(printed.out)["error"]
    assert error["type"] == kind and says in error["message"] and set(error) == {"type", "message"}
    assert ended(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert not printed.out and says in " ".join(printed.err.split())


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.complain(ZeroDivisionError(), as_json=True)
    assert cli.complain(Unsupported("no"), as_json=True) == 2


def test_what_is_no_finite_number_is_null(capsys):
    say_json({"a": [math.nan, (math.inf, -math.inf)], "b": {"c": 0.5, math.inf: 1}, "d": None})
    text = capsys.readouterr().out

    def refuse(word: str):
        raise AssertionError(word)

    wanted = {"a": [None, [None, None]], "b": {"c": 0.5, "inf": 1}, "d": None}
    assert json.loads(text, parse_constant=refuse) == wanted


def test_versions(monkeypatch, capsys):
    assert ended(monkeypatch, "--version") == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert said == {
        **{name: version(name) for name in ("regard", "torch", "transformers")},
        "python": sys.version.split()[0],
    }


def test_names_are_completed():
    assert complete_page("streaming_l") == ["streaming_llm"] and complete_kind("po") == ["position"]
    assert complete_pages("h2o,snapkv+adak") == ["h2o,snapkv+adakv"]
    assert complete_tasks("needle,perp") == ["needle,perplexity"] and not complete_tasks("gla")
    assert complete_page("") == list(catalog.pages())


@pytest.mark.parametrize(
    "words", ["regard show streaming_l", "regard check streaming_l", "regard compare --methods streaming_l"]
)
def test_the_shell_asks_for_names(words):
    asked = {"_REGARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(cli.app, [], env=asked, prog_name="regard")
    assert result.stdout.split() == ["streaming_llm"]


LIGHT = """
import sys
from regard import cli, catalog
from regard.cli import names

def failing(*words):
    try:
        cli.app(list(words), standalone_mode=False)
    except Exception as error:
        return error

assert names.complete_pages("gl") and catalog.pages()
for wrong in (["list", "--pattern", "causal"], ["list", "glaa"], ["list", "--kind", "maks"], ["show", "glaa"],
              ["list", "--family", "lineer"], ["show", "glaa", "--source"]):
    assert isinstance(failing(*wrong), KeyError), wrong
assert failing("show", "gla", "--source") is None
heavy = {"torch", "transformers", "numpy", "scipy"} & set(sys.modules)
assert not heavy, heavy
assert failing("show", "gla") is None and failing("list", "gla") is None
assert "transformers" not in sys.modules
"""


def test_help_names_and_wrong_words_wait_for_no_torch():
    subprocess.run([sys.executable, "-c", LIGHT], check=True, stdout=subprocess.DEVNULL)


def test_a_claim_is_told_in_words():
    from regard.cli.measure import claim_text

    row = {
        "name": "gam",
        "model": "lm",
        "verdict": "holds",
        "seconds": 12.4,
        "bound": "less",
        "note": "absent",
    }
    found = {"loss": {"full": 0.00621, "gam": 2.3975}, "head": [3, 4]}
    assert claim_text({**row, "measured": found}) == [
        "gam on lm: holds, 12 s",
        "bound     less",
        "measured  loss (full 0.00621, gam 2.4), head [3, 4]",
    ]
    head, _, last = claim_text({**row, "model": None, "seconds": None, "measured": {}})
    assert (head, last) == ("gam: holds", "measured  absent")
