"""Every page has a complete card, a neutral configuration that exists, and a file its name names."""

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app
from regard.core import PATTERNS

NAMES = sorted(catalog.pages())


@pytest.mark.parametrize("name", NAMES)
def test_card(name):
    page = catalog.get(name)
    card = page.card
    assert card.title and card.paper and card.idea
    assert 1990 < card.year < 2030
    assert set(page.patterns) <= set(PATTERNS)
    if page.kind in ("cache", "mechanism"):
        assert card.cost and card.state
    page.configure(**card.neutral)
    assert catalog.path_of(name).stem == name


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_and_checks_names(name):
    page = catalog.get(name)
    cfg = page.config()
    for f in fields(cfg)[:1]:
        with pytest.raises(FrozenInstanceError):
            setattr(cfg, f.name, getattr(cfg, f.name))
    with pytest.raises(ValueError, match="has no setting 'nonsense'"):
        page.configure(nonsense=1)


@pytest.mark.parametrize("name", catalog.find(kind="cache"))
def test_cache_pages_take_a_budget(name):
    page = catalog.get(name)
    assert "budget" in {f.name for f in fields(page.config)}
    assert page.budget(page.config()) is not None


def test_names_are_near():
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        regard.method("streaming_lm")
    with pytest.raises(KeyError, match="no kind of page"):
        regard.find(kind="caches")
    assert "streaming_llm" in regard.find(kind="cache", pattern="causal_self")


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
