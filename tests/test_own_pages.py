"""Pages of one's own: found, listed, shown, checked, attached, compared like ours, here and in workers."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app
from regard.core import Unsupported
from regard.kinds import skeleton
from regard.testing.zoo import build


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A cache page as `regard new` writes it, in a catalogue that forgets it afterwards."""
    monkeypatch.setattr(catalog, "_registered", {})
    path = tmp_path / "my_policy.py"
    path.write_text(skeleton("cache", "my_policy"))
    return path


def invoke(*words: str) -> str:
    run = CliRunner().invoke(app, list(words))
    assert run.exit_code == 0, run.output
    return run.stdout


def test_registered_it_is_listed_shown_and_attached(page):
    assert regard.register(page) == "my_policy"
    assert "my_policy" in regard.list_methods("my_*", kind="cache")
    rows = json.loads(invoke("list", "my_*", "--json"))
    assert [row["name"] for row in rows] == ["my_policy"]
    assert rows[0]["path"] == str(page)
    assert "regard.attach(model, 'my_policy'" in json.loads(invoke("show", "my_policy", "--json"))["verb"]
    model, inputs = build("llama")
    with torch.no_grad(), regard.attach(model, "my_policy", budget=4) as attached:
        model(**inputs)
    assert {n for layer in attached.stored() for n in layer} == {4}


def test_the_command_line_writes_and_checks_one(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_registered", {})
    written = json.loads(invoke("new", "mask", "my_stripes", "--in", str(tmp_path), "--json"))
    assert invoke("check", written["path"]).strip().endswith("no law is violated")
    wrong = Path(written["path"])
    wrong.write_text(wrong.read_text().replace('neutral={"stride": 1}', 'neutral={"stride": 2}'))
    catalog.imported.cache_clear()
    run = CliRunner().invoke(app, ["check", str(wrong), "--json"])
    assert run.exit_code == 1
    assert "neutral" in json.loads(run.stdout)["violated"]


def test_the_environment_names_files_and_folders(page):
    code = "import regard; print(regard.list_methods('my_*'), regard.method('my_policy', budget=7).label)"
    for where in (page, page.parent):
        environment = {**os.environ, "REGARD_PAGES": str(where)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "['my_policy'] my_policy(budget=7)"


def test_packages_name_theirs_as_entry_points(page, monkeypatch):
    monkeypatch.syspath_prepend(str(page.parent))
    point = EntryPoint("my_policy", "my_policy:METHOD", "regard.pages")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [point] if group == "regard.pages" else [])
    catalog.installed.cache_clear()
    try:
        assert catalog.get("my_policy").kind == "cache"
        assert catalog.path_of("my_policy") == page
    finally:
        catalog.installed.cache_clear()
        sys.modules.pop("my_policy", None)


def test_workers_of_compare_know_it(page, tmp_path):
    regard.register(page)
    result = regard.compare(
        None, ["my_policy"], ["perplexity"], [96], [0.5], out=tmp_path / "run", samples=1, workers=1
    )
    rows = {row["method"]: row for row in result.rows}
    assert rows["my_policy"]["status"] == "ok", rows["my_policy"]["error"]
    assert rows["my_policy"]["bytes_kept"] < rows["full"]["bytes_kept"]


def test_what_is_no_page_is_an_error(page, tmp_path):
    with pytest.raises(ValueError, match="a file that exists"):
        regard.register(tmp_path / "nowhere.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines METHOD"):
        regard.register(empty)
    taken = tmp_path / "softmax.py"
    taken.write_text(page.read_text())
    with pytest.raises(ValueError, match="a name of its own"):
        regard.register(taken)
    with pytest.raises(ValueError, match="files and folders that exist"):
        catalog.named_in(str(tmp_path / "missing"))
    with pytest.raises(KeyError, match="no kind of page is called 'cach'; near names: cache"):
        skeleton("cach", "mine")
    with pytest.raises(ValueError, match="lower-case"):
        skeleton("cache", "My Policy")
    with pytest.raises(Unsupported, match="here stand cache pages"):
        catalog.from_spec("softmax", kind="cache")
