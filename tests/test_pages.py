"""Every page has a complete card, a neutral configuration that exists, and a file its name names."""

import json
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app

NAMES = sorted(catalog.pages())


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_and_lies_where_its_name_says(name):
    cfg = catalog.get(name).config()
    for f in fields(cfg)[:1]:
        with pytest.raises(FrozenInstanceError):
            setattr(cfg, f.name, getattr(cfg, f.name))
    assert catalog.path_of(name).stem == name


@pytest.mark.parametrize("name", catalog.list_methods(kind="cache"))
def test_cache_pages_take_a_budget(name):
    page = catalog.get(name)
    assert "budget" in {f.name for f in fields(page.config)}
    assert page.budget(page.config()) is not None


def test_names_are_near():
    with pytest.raises(KeyError, match="near names: streaming_llm"):
        regard.method("streaming_lm")
    with pytest.raises(KeyError, match="no kind of page"):
        regard.list_methods(kind="caches")
    assert "streaming_llm" in regard.list_methods(kind="cache", pattern="causal_self")


def test_methods_are_found_by_name_kind_family_pattern_and_need():
    assert regard.list_methods("*linear*") == ["linear_attention"]
    assert set(regard.list_methods("*attention*", kind="cache")) == {"razor_attention", "recycled_attention"}
    assert regard.list_methods(family="dense") == ["lean_attention", "softmax"]
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
