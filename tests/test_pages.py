"""Every page has a complete card, a neutral configuration that exists, and a file its name names."""

import json
import math
import pickle
import re
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app
from regard.core.mask import causal, first, predicate, window
from regard.core.roles import Roles
from regard.testing.pages import check_settings, same_after_pickling

NAMES = sorted(catalog.pages())


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_and_lies_where_its_name_says(name):
    cfg = catalog.get(name).config()
    for f in fields(cfg)[:1]:
        with pytest.raises(FrozenInstanceError):
            setattr(cfg, f.name, getattr(cfg, f.name))
    assert catalog.path_of(name).stem == name


def test_a_page_is_of_the_year_of_its_paper():
    """The year that arXiv's number says, or a venue's, which may be one later."""
    asked = 0
    for name in NAMES:
        card = catalog.get(name).card
        sent = {2000 + int(year) for year in re.findall(r"arXiv:(\d\d)\d\d\.\d", card.paper)}
        venues = {int(year) for year in re.findall(r"\b(?:19|20)\d\d\b(?!\.)", card.paper)}
        known = sent | venues | {year - 1 for year in venues}
        if known and not card.paper.startswith("none: "):
            asked += 1
            assert card.year in known, f"{name}: {card.year}, {card.paper}"
    assert asked > 60


@pytest.mark.parametrize("name", catalog.list_methods(kind="cache"))
def test_cache_pages_take_a_budget(name):
    page = catalog.method(name).page
    if page.codec is not None and page.keep is None and page.score is None:
        return  # all tokens are kept and read, in less memory
    assert "budget" in {f.name for f in fields(page.config)}
    assert page.budget(page.config()) is not None


def test_names_are_near():
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        regard.method("streaming_lm")
    with pytest.raises(KeyError, match="no kind of page"):
        regard.list_methods(kind="caches")
    assert "streaming_llm" in regard.list_methods(kind="cache", pattern="causal_self")


def test_methods_are_found_by_name_kind_family_pattern_and_need():
    assert regard.list_methods("*linear*") == ["linear_attention", "superlinear_attention"]
    assert set(regard.list_methods("*attention*", kind="cache")) == {
        "duo_attention", "expected_attention", "non_causal_attention", "observed_attention", "razor_attention",
        "recycled_attention",
    }  # fmt: skip
    assert {"lean_attention", "softmax"} <= set(regard.list_methods(family="dense"))
    assert not {"gla", "block_topk", "window"} & set(regard.list_methods(family="dense"))
    assert "agent_attention" not in regard.list_methods(kind="mechanism", pattern="causal_self")
    assert "cca_concentric" in regard.list_methods(needs="image")
    assert regard.list_methods("no such *") == []


def test_label_tells_what_is_not_default():
    assert regard.method("h2o").label == "h2o"
    assert regard.method("h2o", budget=0.5).label == "h2o(budget=0.5)"


def test_list_and_show_as_json():
    run = CliRunner()
    rows = json.loads(run.invoke(app, ["list", "--json"]).stdout)
    assert {r["name"] for r in rows} == set(NAMES)
    assert all({"name", "kind", "title", "paper", "patterns", "path"} <= set(r) for r in rows)
    shown = json.loads(run.invoke(app, ["show", "h2o", "--json"]).stdout)
    assert shown["card"]["title"].startswith("H2O")


def test_dir_and_missing_names():
    assert "attach" in dir(regard)
    with pytest.raises(AttributeError, match="has no attribute 'attacj'"):
        regard.attacj  # noqa: B018


def test_the_readme_prints_the_cards():
    """`python scripts/readme.py` writes the table; it must not be kept by hand."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
    shown = CliRunner().invoke(app, ["list", "--markdown"]).stdout
    assert shown.strip() == text.split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0].strip()


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_documents_name_files_that_exist(document):
    root = Path(__file__).parents[1]
    text = (root / document).read_text(encoding="utf8")
    named = set(re.findall(r"`([\w/]+\.py)`", text)) - {"my_policy.py"}
    files = {
        path.as_posix() for folder in ("src", "tests", "scripts") for path in (root / folder).rglob("*.py")
    }
    missing = sorted(name for name in named if not any(file.endswith(f"/{name}") for file in files))
    assert not missing, f"{document} names what is not there: {', '.join(missing)}"


def test_settings_are_held_to_their_annotations():
    """Values that a Config of their own would have stored: 2.5 sinks, a text that is read as no number."""
    for name, settings, rule in (
        ("streaming_llm", {"sinks": 2.5}, r"sinks is a whole number \(sinks=2\.5\)"),
        ("streaming_llm", {"sinks": "x"}, r"sinks is a whole number \(sinks='x'\)"),
        ("gla", {"rank": True}, r"rank is a whole number \(rank=True\)"),
        ("softmax", {"sinks": 2}, r"sinks is True or False \(sinks=2\)"),
        ("softmax", {"scale": math.nan}, r"scale is a number or None \(scale=nan\)"),
        ("tokenselect", {"reuse": "none"}, r"reuse is a number or None \(reuse='none'\)"),
        ("razor_attention", {"heads": 3}, r"heads is a tuple, .* \(heads=3\)"),
        ("tokenselect", {"vote": "sof"}, "vote is 'soft' or 'raw', not 'sof'; near names: soft"),
    ):
        with pytest.raises(ValueError, match=rule):
            catalog.method(name, **settings)
    with pytest.raises(ValueError, match="sinks is a whole number"):
        catalog.method("streaming_llm").with_settings(sinks="x")
    # what JSON and numpy bring is taken over as the Config's own types
    read = catalog.method("razor_attention", heads=[[0, 1]], sinks=np.int64(4))
    assert read == catalog.method("razor_attention", heads=((0, 1),)) and type(read.config.sinks) is int
    assert catalog.from_spec("gla:tau=inf").config.tau == math.inf


def test_a_config_that_takes_anything_is_found(monkeypatch):
    page = catalog.get("linear_attention")
    check_settings("linear_attention", page)
    monkeypatch.setattr("regard.core.pages.fitted", lambda title, config, settings: settings)
    with pytest.raises(AssertionError, match="eps='no_such_value' is no "):
        check_settings("linear_attention", page)


def test_masks_and_roles_are_pickled_and_copied():
    roles = Roles(document=[[0, 0, 1]], padding=[0, 0, 0])
    for back in (pickle.loads(pickle.dumps(roles)), deepcopy(roles)):
        assert back.names == roles.names and torch.equal(back["document"], roles["document"])
    mask = causal() & (window(3) | ~first(1))
    back = pickle.loads(pickle.dumps(mask))
    assert back == mask and repr(back) == repr(mask) and torch.equal(back.dense(6), mask.dense(6))


def test_a_mask_made_in_a_function_is_copied_and_says_why_it_cannot_be_pickled():
    @predicate()
    def odd(at):
        return at.k % 2 == 1

    assert deepcopy(odd() | causal()) == odd() | causal()
    with pytest.raises(AttributeError, match="odd"):
        pickle.dumps(odd())
    with pytest.raises(AssertionError, match=r"odd\(\) & causal\(\): cannot be pickled"):
        same_after_pickling("odd() & causal()", odd() & causal())
